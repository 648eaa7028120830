"""The profile routes: off without --profile, and what the engine refuses is a 400 that says why."""

import pytest

from tests.control.server_calls import call, error_of
from tests.control.server_fakes import make_state


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
def test_without_the_flag_the_routes_are_404_and_name_it(path):
    status, kind, _, message = error_of(call(make_state(), "POST", path))
    assert (status, kind) == (404, "NotFoundError") and "--profile" in message


def test_start_and_stop_reach_the_engine_with_the_folder():
    state = make_state(profile="/traces")
    assert error_of(call(state, "POST", "/stop_profile"))[0] == 400
    assert call(state, "POST", "/start_profile").status_code == 200
    assert call(state, "POST", "/stop_profile").status_code == 200
    assert state.engine.profiled == ["/traces", None]
