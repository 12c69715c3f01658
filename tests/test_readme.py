"""What the README says is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from smda_callbacks.cli.main import build_parser
from smda_callbacks.sinks.metrics import markdown_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_metric_reference_is_the_generated_one() -> None:
    block = re.search(r"<!-- metrics:begin -->\n(.*)<!-- metrics:end -->", README, re.DOTALL)
    assert block is not None
    assert block[1].strip() == markdown_table().strip()


def test_the_test_command_is_what_ci_runs() -> None:
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_file_and_command_it_names_exists() -> None:
    for path in re.findall(r"`((?:recipes|configs)/[\w./-]+)`|\]\((?!http)([\w./-]+)\)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
    for name in re.findall(r"`((?:maths|observe|sinks|training|report|config|cli)/\w+\.py)`", README):
        assert (ROOT / "smda_callbacks" / name).is_file(), name
    named = set(re.findall(r"smda (\w+)", README))
    known = set(next(a for a in build_parser()._actions if a.dest == "command").choices)
    assert named & known == known
