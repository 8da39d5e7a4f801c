"""Claims of papers, judged on sweeps whose true effects are known."""

import json

import pytest
from made_results import MODELS, made_results

import claims
from pretraining.recipe import UsageError

HEAD = 'paper = "P"\nclaim = "C"\nsweep = "made"\n'
TEXT = HEAD + 'task = "text"\nfigure = "bits_per_byte"\n'
RECALL = HEAD + 'task = "recall"\nfigure = "accuracy/pairs_32"\n'
SPEED = HEAD + 'figure = "training_tokens_per_second"\n'


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes claims, judges them, and gives (claims.md, verdicts)."""
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    folder = tmp_path / "ablations/made"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(made_results(MODELS)))

    def judge(*tables):
        file = tmp_path / "claims.toml"
        file.write_text("".join(f"[[claims]]\n{table}\n" for table in tables))
        claims.start([str(file)])
        text = (tmp_path / "claims.md").read_text()
        rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| P")]
        return text, [row[-1].strip(" *") for row in rows]

    return judge


def between(better, worse):
    return f'better = "{better}"\nworse = "{worse}"'


def test_what_is_true_is_shown_and_what_is_not_is_not(written):
    text, verdicts = written(
        TEXT + between("rwkv7", "transformer"),  # by 0.12, where a seed moves a model by 0.003
        TEXT + between("transformer", "rwkv7"),
        TEXT + between("transformer", "infini"),  # apart by 0.001
        RECALL + between("rwkv7", "hybrid"),  # an accuracy: more is better
        SPEED + 'flat = "retnet"\nlengths = [256, 4096]',
        TEXT + between("infini", "transformer") + "\nwithin = 0.05",
        TEXT + between("infini", "rwkv7") + "\nwithin = 0.05",
        TEXT + between("window", "transformer") + "\nwithin = 0.06",
        SPEED + 'flat = "transformer"\nlengths = [256, 4096]',
    )
    assert verdicts == [
        claims.SHOWN,
        claims.CONTRADICTED,
        claims.NOT_SHOWN,
        claims.SHOWN,
        claims.SHOWN,
        claims.SHOWN,
        claims.CONTRADICTED,
        claims.NOT_SHOWN,
        claims.CONTRADICTED,
    ]
    assert "72,000 tokens/s at 256, 72,000 at 4,096 (1.00)" in text
    assert "seeds 1, 2, 3, models of 98,304 to" in text


def test_who_fails_the_control_proves_nothing_of_states(written):
    _, verdicts = written(RECALL + between("rwkv7", "rwkv4"))
    assert verdicts == ["rwkv4 did not learn the control"]


def test_many_claims_are_corrected_for(written):
    close = TEXT + between("rwkv5", "rwkv6")
    _, alone = written(TEXT + between("rwkv6", "rwkv5"))
    _, (first, *_) = written(TEXT + between("rwkv6", "rwkv5"), *[close.replace("C", "D")] * 60)
    assert (alone, first) == ([claims.SHOWN], claims.NOT_SHOWN)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TEXT, "claim 1 names either"),
        (TEXT + between("rwkv8", "rwkv7"), "there is no 'rwkv8': did you mean"),
        (TEXT.replace("text", "texts") + between("rwkv6", "rwkv7"), "there is no 'texts'"),
        (TEXT.replace("made", "other") + between("rwkv6", "rwkv7"), "results.json is missing"),
        (HEAD + between("rwkv6", "rwkv7"), "claim 1 lacks figure"),
        (TEXT + between("rwkv6", "rwkv7") + '\nsize = "8"', "claim 1: unknown key 'size'"),
    ],
)
def test_bad_claims(written, table, message):
    with pytest.raises(UsageError, match=message):
        written(table)


def test_ours_are_read():
    assert claims.read_claims(claims.CLAIMS)
