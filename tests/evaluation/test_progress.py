"""What an evaluation says while it works, where there is no terminal."""

from ddlm.evaluation.progress import EVERY, lines


def test_a_log_gets_a_line_now_and_then():
    said, now = [], 0.0
    tell = lines(said.append, lambda: now)
    tell("drawing", 0, 500)
    now = EVERY - 1
    tell("drawing", 100, 500)
    assert said == []
    now = 2 * EVERY
    tell("drawing", 200, 500)
    assert said == ["drawing: 200 of 500, 1:30 left"]
    now += EVERY
    tell("judging", 32, 64)  # another part: nothing is known of its pace
    now += EVERY
    tell("judging", 48, 64)
    assert said[1:] == ["judging: 32 of 64", "judging: 48 of 64, 0:30 left"]


def test_it_goes_to_the_log_of_errors(capsys, monkeypatch):
    from ddlm.evaluation import progress

    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.progress_bar() as tell:
        tell("drawing", 1, 2)
    found = capsys.readouterr()
    assert found.err == "drawing: 1 of 2\n"
    assert found.out == ""
