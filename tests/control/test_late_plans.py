"""Plans that wait for newcomers while a long step runs: the forecast, and when the loop asks to be left alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxserve import engine_process
from jaxserve.engine import loop as loop_module
from jaxserve.engine.landing import HOST_MARGIN, MARGIN, RECENT, LandingForecast
from tests.engine_harness import Harness, make_harness, make_request


def test_nothing_is_known_of_sizes_never_seen() -> None:
    forecast = LandingForecast()
    assert forecast.launch_by(tokens=256) == 0
    forecast.observe(tokens=256, seconds=0.2, host_s=0)
    assert forecast.launch_by(tokens=64) == forecast.launch_by(tokens=1024) == 0
    assert forecast.launch_by(tokens=260) == pytest.approx((1 - MARGIN) * 0.2)


def test_the_shortest_of_recent_steps_counts_and_old_ones_are_forgotten() -> None:
    forecast = LandingForecast()
    for seconds in (0.1, *[0.3] * (RECENT - 1)):
        forecast.observe(tokens=256, seconds=seconds, host_s=0)
    assert forecast.launch_by(tokens=256) == pytest.approx((1 - MARGIN) * 0.1)
    forecast.observe(tokens=256, seconds=0.3, host_s=0)
    assert forecast.launch_by(tokens=256) == pytest.approx((1 - MARGIN) * 0.3)


def test_the_host_has_its_time_and_a_slow_one_is_never_waited_for() -> None:
    forecast = LandingForecast()
    forecast.observe(tokens=256, seconds=0.1, host_s=0.01)
    assert forecast.launch_by(tokens=256) == pytest.approx((1 - MARGIN) * 0.1 - HOST_MARGIN * 0.01)
    forecast.observe(tokens=256, seconds=0.1, host_s=0.05)
    assert forecast.launch_by(tokens=256) == 0


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The loop's own clock, standing still."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(loop_module, "perf_counter", lambda: now.s)
    return now


def landed_once(seconds: SimpleNamespace) -> Harness:
    """A step of a prompt of 32 tokens has taken a second; the next of them is in flight."""
    harness = make_harness(tokens_max=32)
    harness.add(make_request("a", 32, max_tokens=1))
    harness.step()
    assert harness.loop.hold_s == 0
    seconds.s += 1
    harness.step()
    harness.add(make_request("b", range(40, 72), max_tokens=3))
    harness.step()
    return harness


def test_a_plan_waits_while_a_step_with_prompts_is_far_from_its_end(seconds) -> None:
    harness = landed_once(seconds)
    assert harness.loop.hold_s == pytest.approx(1 - MARGIN)
    seconds.s += 0.4
    assert harness.loop.hold_s == pytest.approx(0.6 - MARGIN)
    seconds.s += 0.6
    assert harness.loop.hold_s == 0
    harness.run().assert_alone()


def test_a_step_that_lands_early_is_followed_at_once(seconds) -> None:
    harness = landed_once(seconds)
    harness.runner.has_landed = True
    assert harness.loop.hold_s == 0


def test_a_step_that_others_will_fill_is_not_put_off_for_newcomers(seconds) -> None:
    harness = landed_once(seconds)
    harness.add(make_request("c", range(50, 80)))
    assert harness.loop.hold_s > 0
    harness.add(make_request("d", range(60, 90)))
    assert harness.loop.hold_s == 0


def test_nobody_is_waited_for_without_a_row_to_give(seconds) -> None:
    harness = landed_once(seconds)
    assert harness.loop.hold_s > 0
    harness.loop._roster._free_rows.clear()
    assert harness.loop.hold_s == 0


def test_steps_of_decodes_are_followed_at_once(seconds) -> None:
    harness = landed_once(seconds)
    harness.step()
    assert harness.loop.has_work and harness.loop.hold_s == 0


def test_without_overlap_nothing_is_in_flight_to_wait_for(seconds) -> None:
    harness = make_harness(overlap=False, tokens_max=32)
    harness.add(make_request("a", 70))
    harness.step()
    seconds.s += 1
    harness.step()
    assert harness.loop.hold_s == 0


def test_the_channel_is_read_while_a_plan_waits() -> None:
    loop = SimpleNamespace(is_stalled=False, has_work=True, hold_s=0.2)
    assert engine_process._wait_s(loop) == engine_process.HOLD_S    # type: ignore[arg-type]
    loop.hold_s = 0.001
    assert engine_process._wait_s(loop) == 0.001                    # type: ignore[arg-type]
    loop.hold_s = 0.0
    assert engine_process._wait_s(loop) == 0                        # type: ignore[arg-type]
    loop.has_work = False
    assert engine_process._wait_s(loop) == engine_process.BEAT_S    # type: ignore[arg-type]
