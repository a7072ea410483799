"""What a run notes of its machine."""

from bench.measure import machine


def test_without_git_the_commit_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MICA_BENCH_COMMIT", "abc")
    assert machine.facts()["commit"] == "abc"
