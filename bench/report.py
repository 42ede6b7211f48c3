"""What the benchmarks that write a table share: their options, and where a result goes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lath.integration.benchmark import machine_facts


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options of every such benchmark; description: its docstring."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, `threads` in force."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def command_of(script: str) -> str:
    """What was typed, to be shown beside the result. script: bench/<script>."""
    return " ".join(["python", f"bench/{script}", *sys.argv[1:]])


def save(options: argparse.Namespace, name: str, table: str, command: str, **content: Any) -> None:
    """Print the table and write it as <name>.md, with the machine and `content` as <name>.json."""
    print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.md").write_text(table)
    record = {
        "command": command, "machine": machine_facts(), "threads": options.threads, **content,
    }  # fmt: skip
    (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
