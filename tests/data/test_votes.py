"""Repeated judgements: counted by hand, turned answers, ties, circles, and the file that the command writes."""

import itertools
import json
import random

import pytest

from trl_cpo.cli import main
from trl_cpo.data.votes import VoteError, count_votes, in_words, strongly_connected


def rows(*judged: str, prompt: str = "Q", **more) -> list[dict]:
    """ "ab" is one judgement of a over b."""
    return [{"prompt": prompt, "chosen": pair[0], "rejected": pair[1], **more} for pair in judged]


def test_judgements_in_either_order_are_one_pair():
    (pair,) = [each.pair() for each in count_votes(rows("ab", "ba", "ba", "ba")).judged]
    assert pair == {"prompt": "Q", "chosen": "b", "rejected": "a", "chosen_probs": 3.5 / 5, "votes": 4, "votes_chosen": 3}


def test_a_single_judgement_is_no_certainty_and_a_tie_is_a_coin_flip():
    single, tie = (each.pair() for each in count_votes(rows("ab", "cd", "dc")).judged)
    assert single["chosen_probs"] == 0.75
    assert (tie["chosen"], tie["chosen_probs"], tie["votes_chosen"]) == ("c", 0.5, 1)


def test_the_same_answers_to_another_prompt_are_another_pair():
    counted = count_votes([*rows("ab"), *rows("ba", prompt="R"), *rows("aa")])
    assert [each.votes for each in counted.judged] == [[1, 0], [1, 0]] and counted.same == 1


def test_messages_are_told_apart_by_their_content():
    def said(text, **more):
        return [{"role": "assistant", "content": text, **more}]

    prompt = [{"role": "user", "content": "Q"}]
    judged = [
        {"prompt": prompt, "chosen": said("a"), "rejected": said("b", name=None)},
        {"prompt": prompt, "chosen": said("b"), "rejected": said("a")},
    ]
    (pair,) = count_votes(judged).judged
    assert pair.votes == [1, 1] and pair.tied and pair.pair()["chosen"] == said("a")


def test_columns_of_counts():
    judged = [
        {"chosen": "a", "rejected": "b", "for": 3, "against": 1},
        {"chosen": "b", "rejected": "a", "for": 0, "against": 2},
        {"chosen": "c", "rejected": "d", "for": 0, "against": 0},
    ]
    counted = count_votes(judged, counts=("for", "against"))
    (pair,) = [each.pair() for each in counted.judged]
    assert pair == {"chosen": "a", "rejected": "b", "chosen_probs": 5.5 / 7, "votes": 6, "votes_chosen": 5}
    assert counted.judgements == 6
    with pytest.raises(VoteError, match="Row 0: for must be a number of votes, a whole number ≥ 0; got -1"):
        count_votes([{"chosen": "a", "rejected": "b", "for": -1, "against": 2}], counts=("for", "against"))


def test_columns_to_keep_must_agree():
    (pair,) = count_votes(rows("ab", "ba", topic="x"), keep=["topic"]).judged
    assert pair.pair()["topic"] == "x"
    with pytest.raises(VoteError, match="Row 1: topic is 'y', and 'x' in an earlier judgement"):
        count_votes([*rows("ab", topic="x"), *rows("ba", topic="y")], keep=["topic"])


def test_circles_are_found_and_ties_break_none():
    counted = count_votes(
        [
            *rows("ab", "bc", "ca", "ad", "bd", "xy"),
            *rows("ab", "bc", "ca", "ac", prompt="R"),
            *rows("ab", "bc", "ac", "ca", prompt="S"),
        ]
    )
    report = counted.report()
    assert (report["prompts_with_cycles"], report["pairs_in_cycles"]) == (1, 3)
    assert sorted(report["cycles"][0]["answers"]) == ["a", "b", "c"] and report["cycles"][0]["prompt"] == "Q"
    assert "3 pairs of 1 prompts lie in circles" in in_words(report)
    assert report["contested"] == report["tied"] == 2


def test_groups_are_those_of_reachability():
    """On random graphs: two nodes are in one group exactly if each reaches the other."""
    for seed in range(60):
        rng = random.Random(seed)
        nodes = "abcdefg"[: rng.randint(2, 7)]
        beats = {node: [other for other in nodes if other != node and rng.random() < 0.25] for node in nodes}
        reached = {node: {node} for node in nodes}
        for _ in nodes:
            for node in nodes:
                reached[node] |= {far for near in set(reached[node]) for far in beats[near]}
        together = {frozenset(b for b in nodes if b in reached[a] and a in reached[b]) for a in nodes}
        assert {frozenset(group) for group in strongly_connected(beats)} == {group for group in together if len(group) > 1}


def test_a_long_chain_needs_no_recursion():
    names = [str(number) for number in range(5_000)]
    chain = {one: [other] for one, other in itertools.pairwise([*names, names[0]])}
    assert [len(group) for group in strongly_connected(chain)] == [5_000]


class TestCommand:
    def test_pairs_that_can_be_trained_on(self, tmp_path, capsys):
        source, out = tmp_path / "judged.jsonl", tmp_path / "pairs.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows("ab", "ba", "ba", topic="x")))
        assert main(["votes", str(source), str(out), "--keep", "topic"]) == 0
        (pair,) = map(json.loads, out.read_text().splitlines())
        assert pair["chosen"] == "b" and pair["chosen_probs"] == 2.5 / 4 and pair["topic"] == "x"
        said = capsys.readouterr().out
        assert "3 judgements of 1 pairs" in said and "1 pairs have votes for both answers" in said
        assert main(["votes", str(source), str(out)]) == 2
        assert "exists and is not overwritten" in capsys.readouterr().err

    def test_the_report_alone_as_json(self, tmp_path, capsys):
        source = tmp_path / "judged.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows("ab", "bc", "ca")))
        assert main(["votes", str(source), str(tmp_path / "out.jsonl"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["pairs_in_cycles"] == 3 and report["judged_once"] == 3

    def test_what_cannot_be_counted(self, tmp_path, capsys):
        source = tmp_path / "judged.jsonl"
        source.write_text(json.dumps(rows("aa")[0]) + "\n")
        assert main(["votes", str(source), str(tmp_path / "out.jsonl")]) == 2
        assert "no judgement of two different answers" in capsys.readouterr().err
        assert main(["votes", str(source), str(tmp_path / "out.jsonl"), "--counts", "x", "y"]) == 2
        assert "has no column 'x' and no column 'y'" in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()
