"""A thousand damaged videos and images: the reader returns frames or a sentence for each, and continues."""

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import fuzz_reader

MUTANTS = 1100
SECONDS = 300.0  # for one mutant; far above the usual time, so that a busy machine does not fail the test


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return fuzz_reader.intact_files()


def test_every_mutant_is_read_or_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    endings = list(fuzz_reader.run(files, range(MUTANTS), 0, "isolated", SECONDS, 2, tmp_path))
    assert sorted(ending.number for ending in endings) == list(range(MUTANTS))
    assert [ending for ending in endings if ending.outcome not in fuzz_reader.GOOD] == []
    outcomes = Counter(ending.outcome for ending in endings)
    assert min(outcomes[fuzz_reader.READ], outcomes[fuzz_reader.REFUSED]) > MUTANTS / 10, "the damage tests nothing"
    for ending in endings:
        if ending.outcome == fuzz_reader.REFUSED:
            assert str(tmp_path) in ending.detail
            assert "\n" not in ending.detail


def test_a_mutant_depends_only_on_seed_and_number(files: dict[str, bytes]) -> None:
    for number in range(50):
        kind, content = fuzz_reader.mutant(files, 0, number)
        assert (kind, content) == fuzz_reader.mutant(files, 0, number)
    changed = [fuzz_reader.mutant(files, 0, number)[1] not in files.values() for number in range(200)]
    assert sum(changed) > 190


@pytest.mark.parametrize("how", ["crash", "hang", "raise"])
def test_the_fuzzer_detects_crashing_readers(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    endings = {"crash": "import os; os.kill(os.getpid(), 9)", "hang": "while True: pass", "raise": "raise KeyError(0)"}
    monkeypatch.setitem(fuzz_reader.READERS, "bad", lambda path: exec(endings[how]))
    outcome = {"crash": fuzz_reader.CRASH, "hang": fuzz_reader.TIMEOUT, "raise": fuzz_reader.OTHER}[how]
    found = list(fuzz_reader.run(files, range(4), 0, "bad", 1.0, 2, tmp_path))
    assert [ending.outcome for ending in found] == [outcome] * 4
