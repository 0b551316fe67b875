"""benchmarks/harness: what every benchmark stands on."""

from benchmarks.harness.parts import part


def test_parts_are_computed_once(tmp_path):
    count = []
    for settings in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert part(tmp_path, settings, lambda s=settings: (count.append(0), {"b": s["a"]})[1]) == {"b": settings["a"]}
    assert len(count) == 2
