"""The English text on which `lath run` measures perplexity.

text/english.txt was written for this project and is, like the rest of it, under the Apache License
2.0. About 3,200 words of plain narrative prose that no model can have been trained on before it was
published here.
"""

from __future__ import annotations

from pathlib import Path


def english_text() -> str:
    """The whole text, paragraphs separated by blank lines."""
    return (Path(__file__).parent / "text" / "english.txt").read_text(encoding="utf-8")
