"""Texts with a needle: a number in one sentence of many, and the question for it."""

from __future__ import annotations

import random
from typing import Any

QUESTION = (
    "\nQuestion: What is the special magic number?\nAnswer: The special magic number is"
)  # fmt: skip
WHO = "The baker,A gardener,The old clerk,A young painter,The miller,Our neighbour,The carpenter,A quiet student,The ferryman,The tailor,A travelling doctor,The librarian,A shepherd,The mason,The cook,A retired sailor"  # noqa: E501
DID = "carried,repaired,painted,described,borrowed,measured,sold,admired,forgot,cleaned,sketched,moved,counted,hid,polished,returned"  # noqa: E501
HOW = "small,wooden,heavy,plain,green,broken,narrow,grey,striped,pale,round,rusty,warm,empty,bright,folded"  # noqa: E501
WHAT = "table,lantern,basket,ladder,blanket,window frame,kettle,clock,boat,fence,chair,map,bucket,wheel,coat,drum"  # noqa: E501
WHERE = "near the harbour,behind the mill,in the long hall,by the river,under the bridge,beside the orchard,at the edge of the field,on the upper floor,across the square,close to the station,below the hill,outside the workshop,along the canal,inside the barn,next to the well,in front of the school"  # noqa: E501
WHEN = "before breakfast,on a windy morning,after the rain,late in the evening,during the fair,in early spring,when the bells rang,at noon,on market day,as the snow fell,before the guests arrived,after a long walk,while the children slept,towards the end of summer,at first light,on the way home"  # noqa: E501


def filler(tokenizer: Any, rng: random.Random, count: int) -> list[int]:
    """`count` tokens of plain sentences, of which no two are the same."""
    parts = [words.split(",") for words in (WHO, DID, HOW, WHAT, WHERE, WHEN)]
    ids: list[int] = []
    seen = set()
    while len(ids) < count:
        who, did, how, what, where, when = (rng.choice(words) for words in parts)
        sentence = f" {who} {did} the {how} {what} {where} {when}."
        if sentence not in seen:
            seen.add(sentence)
            ids += tokenizer(sentence).input_ids
    return ids[:count]


def sentence(number: str) -> str:
    return f" The special magic number is {number}."


def prompt(tokenizer: Any, length: int, depth: float, seed: int) -> tuple[list[int], str]:
    """`length` tokens and the number that is asked for."""
    rng = random.Random(f"{length} {depth} {seed}")
    number = str(rng.randint(10000, 99999))
    needle = tokenizer(sentence(number)).input_ids
    question = tokenizer(QUESTION).input_ids
    text = filler(tokenizer, rng, length - len(needle) - len(question))
    at = int(depth * len(text))
    return text[:at] + needle + text[at:] + question, number
