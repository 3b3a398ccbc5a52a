"""What the server keeps for the page: bounded, in order, and commands that reach the run that is on."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from diff2flow_nodes.hosts.page import Board, Place

NODE = Place("7", "a-workflow")


def begun(step: int = 0, name: str = "ink", board: Board | None = None) -> Board:
    board = board or Board()
    board.tell(NODE, {"kind": "begin", "name": name, "step": step, "steps": 100})
    return board


def entries(board: Board, kind: str = "", place: Place = NODE) -> list[Any]:
    return [entry for entry in board.history(place)["entries"] if kind in ("", entry["kind"])]


def step(board: Board, number: int) -> dict[str, Any]:
    return board.tell(NODE, {"kind": "step", "step": number, "loss": 1.0 / number})


def test_entries_come_back_in_order_and_only_those_not_known() -> None:
    board = begun()
    told = [step(board, 1), board.tell(NODE, {"kind": "validation", "step": 1, "loss": 2.0}), step(board, 2)]
    assert [entry["kind"] for entry in entries(board)] == ["begin", "step", "validation", "step"]
    assert entries(board)[1:] == told and told[0]["node"] == "7" and told[0]["workflow"] == "a-workflow"
    assert board.history(NODE, told[1]["seq"])["entries"] == told[2:]
    assert board.history(Place("8", "a-workflow")) == {"entries": [], "running": False, "known": False}


def test_why_a_run_began_anew_is_forgotten_when_it_is_continued() -> None:
    board = begun()
    board.tell(NODE, {"kind": "note", "step": 0, "text": "not continued"})
    assert [entry["kind"] for entry in entries(board)] == ["begin", "note"]
    assert not entries(begun(step=4, board=board), "note")


def test_numbers_rise_over_a_restart() -> None:
    assert step(Board(), 1)["seq"] <= step(Board(), 1)["seq"]


def test_a_long_run_keeps_its_first_and_last_steps_and_little_memory() -> None:
    board = begun()
    for number in range(1, 20_001):
        step(board, number)
    kept = [entry["step"] for entry in entries(board, "step")]
    assert 600 <= len(kept) <= 1201 and kept[0] < 40 and kept[-1] == 20_000 and kept == sorted(set(kept))
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert max(gaps) <= 40


def test_pictures_are_bounded_and_the_oldest_are_forgotten() -> None:
    board = begun()
    told = [board.tell(NODE, {"kind": "picture", "step": n}, b"%d" % n) for n in range(30)]
    assert [entry["step"] for entry in entries(board, "picture")] == list(range(6, 30))
    assert board.picture(NODE, told[5]["seq"]) is None and board.picture(NODE, told[29]["seq"]) == b"29"


def test_only_the_last_nodes_are_kept() -> None:
    board = Board()
    for number in range(20):
        board.tell(Place(str(number)), {"kind": "begin", "step": 0})
    assert [len(entries(board, place=Place(str(n)))) for n in (0, 11, 12, 19)] == [0, 0, 1, 1]


def test_a_new_run_forgets_the_one_before_and_one_that_goes_on_does_not() -> None:
    board = begun()
    step(board, 1)
    board.tell(NODE, {"kind": "end", "step": 1, "steps": 100})
    begun(1, board=board)
    assert [entry["kind"] for entry in entries(board)] == ["step", "begin"]
    begun(1, "another", board)
    assert [entry["kind"] for entry in entries(board)] == ["begin"]
    step(board, 2)
    begun(0, "another", board)
    assert [entry["kind"] for entry in entries(board)] == ["begin"]


def test_a_command_is_heard_once_by_the_run_that_is_on() -> None:
    board = Board()
    assert not board.ask(NODE, "save") and board.asked(NODE) == ""
    begun(board=board)
    assert board.history(NODE)["running"] and board.ask(NODE, "save") and board.ask(NODE, "stop")
    assert board.ask(NODE, "save")  # a stop saves as well: it stays
    assert [board.asked(NODE), board.asked(NODE)] == ["stop", ""]
    board.ask(NODE, "stop")
    board.tell(NODE, {"kind": "end", "step": 5, "steps": 100})
    assert board.asked(NODE) == "" and not board.ask(NODE, "stop") and not board.history(NODE)["running"]
    with pytest.raises(ValueError, match="save, stop"):
        board.ask(NODE, "explode")


def test_a_run_queued_without_a_page_is_found_by_its_node_alone() -> None:
    board = Board()
    board.tell(Place("7"), {"kind": "begin", "step": 0})
    assert board.history(NODE)["running"] and board.ask(NODE, "save") and board.asked(Place("7")) == "save"


def test_a_graph_without_an_id_is_found_under_the_one_that_a_reload_gives_it() -> None:
    board = Board()
    board.tell(Place("7", "00000000-0000-0000-0000-000000000000"), {"kind": "begin", "step": 0})
    assert board.history(Place("7", "81ab1e5f-1ed1-41c2-a991-ae45e13b231b"))["known"]


def test_asking_while_it_is_told_is_safe() -> None:
    board, wrong = begun(), []

    def read() -> None:
        try:
            for _ in range(200):
                board.history(NODE)
        except Exception as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(1, 400):
            step(board, number)
        reader.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []
