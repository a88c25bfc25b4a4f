"""How long a step takes by the compiler's own cycles, and what of the network they do not hide."""

from __future__ import annotations

import pytest

from stages.core.plan import hlo
from stages.core.plan.step_time import HOP_SECONDS, step_time
from tests.support.plans import described

V5E = described("v5e:2x4", 8)
MILLISECOND = 1_500_000  # cycles of a v5e
# 8 MB on each of eight devices: a ring of two links sends seven eighths at 100 GB/s.
GATHER = 7 * 8_000_000 / 100e9 + 4 * HOP_SECONDS

HEAD = """HloModule m, is_scheduled=true

FileNames
1 "/somewhere/stages/core/model/decoder.py"
2 "/somewhere/stages/core/model/products.py"
3 "/somewhere/stages/core/model/cross_entropy.py"
4 "/somewhere/keras/src/layers/normalization/rms_normalization.py"
5 "/somewhere/stages/core/model/attention.py"

FunctionNames
1 "_block"
2 "_mix"
3 "product"
4 "token_losses"
5 "call"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=4 end_column=9}
2 {file_name_id=5 function_name_id=2 line=8 end_line=8 column=4 end_column=9}
3 {file_name_id=2 function_name_id=3 line=9 end_line=9 column=4 end_column=9}
4 {file_name_id=3 function_name_id=4 line=9 end_line=9 column=4 end_column=9}
5 {file_name_id=4 function_name_id=5 line=9 end_line=9 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=1}
5 {file_location_id=5 parent_frame_id=2}

%dots (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %d = bf16[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={stack_frame_id=FRAME}
}

%moves (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %t = bf16[8,8]{1,0} transpose(%a), dimensions={1,0}
}

%adds (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %t = bf16[8,8]{1,0} add(%a, %a)
}

"""  # noqa: E501


def cycles(count: int, frame: int = 1) -> str:
    return f'metadata={{stack_frame_id={frame}}}, backend_config={{"estimated_cycles":"{count}"}}'


def found(lines: str, before: str = "", frame: int = 1):
    entry = "ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {\n  %p = bf16[8,8]{1,0} parameter(0)\n"
    entry += "  %w = bf16[4000000]{0} parameter(1)\n"
    return step_time(hlo.parse(HEAD.replace("FRAME", str(frame)) + before + entry + lines + "\n}\n"), V5E)


@pytest.mark.parametrize(
    ("calls", "frame", "part"),
    [
        ("dots", 1, "products"),
        ("dots", 3, "attention"),
        ("dots", 4, "head"),
        ("adds", 3, "attention"),
        ("adds", 4, "head"),
        ("adds", 5, "norms"),
        ("adds", 1, "other"),
        ("moves", 3, "copies"),
    ],
)
def test_time_belongs_to_the_part_of_the_model_that_the_code_is_of(calls, frame, part):
    line = f"  ROOT %f = bf16[8,8]{{1,0}} fusion(%p), kind=kLoop, calls=%{calls}, {cycles(2 * MILLISECOND, frame)}"
    time = found(line, frame=frame)
    assert getattr(time, part) == pytest.approx(2e-3) and time.seconds == pytest.approx(2e-3)


def test_a_loops_body_counts_as_often_as_it_runs():
    body = (
        f"%body (a: bf16[8,8]) -> bf16[8,8] {{\n  %a = bf16[8,8]{{1,0}} parameter(0)\n"
        f"  ROOT %f = bf16[8,8]{{1,0}} fusion(%a), calls=%dots, {cycles(MILLISECOND)}\n}}\n\n"
    )
    loop = (
        '  ROOT %l = bf16[8,8]{1,0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"28"}}'
    )
    assert found(loop, body).products == pytest.approx(28e-3)


GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"


def test_a_collective_that_nothing_hides_is_waited_for():
    time = found(f"  ROOT %g = bf16[32000000]{{0}} all-gather(%w), {GROUPS}")
    assert time.network == pytest.approx(GATHER) and time.seconds == time.network


@pytest.mark.parametrize("milliseconds", [0.1, 0.5, 3])
def test_of_a_collective_that_is_awaited_later_only_the_rest_is_waited_for(milliseconds):
    work = cycles(round(milliseconds * MILLISECOND))
    time = found(
        f"  %s = (bf16[4000000]{{0}}, bf16[32000000]{{0}}) all-gather-start(%w), {GROUPS}\n"
        f"  %f = bf16[8,8]{{1,0}} fusion(%p), calls=%dots, {work}\n"
        "  ROOT %d = bf16[32000000]{0} all-gather-done(%s)"
    )
    assert time.network == pytest.approx(max(0.0, GATHER - milliseconds * 1e-3))
    assert time.products == pytest.approx(milliseconds * 1e-3)


def test_two_collectives_take_turns_on_the_links():
    time = found(
        f"  %s = (bf16[4000000]{{0}}, bf16[32000000]{{0}}) all-gather-start(%w), {GROUPS}\n"
        f"  %g = bf16[32000000]{{0}} all-gather(%w), {GROUPS}\n"
        "  ROOT %d = bf16[32000000]{0} all-gather-done(%s)"
    )
    assert time.network == pytest.approx(2 * GATHER)


ROUND = [(0, 1), (1, 3), (3, 5), (5, 7), (7, 6), (6, 4), (4, 2), (2, 0)]


@pytest.mark.parametrize("back", [False, True])
def test_a_permutation_has_one_link_and_the_other_way_round_is_free(back):
    def permute(name: str, pairs: list[tuple[int, int]]) -> str:
        written = ",".join(f"{{{source},{target}}}" for source, target in pairs)
        return (
            f"  %{name} = (bf16[4000000]{{0}}, bf16[4000000]{{0}}) collective-permute-start(%w), "
            f"source_target_pairs={{{written}}}\n"
        )

    other = [(target, source) for source, target in ROUND] if back else ROUND
    time = found(
        permute("one", ROUND)
        + permute("other", other)
        + "  %a = bf16[4000000]{0} collective-permute-done(%one)\n"
        + "  ROOT %b = bf16[4000000]{0} collective-permute-done(%other)"
    )
    one = 8_000_000 / 50e9 + HOP_SECONDS
    assert time.network == pytest.approx(one if back else 2 * one)


def test_a_collective_inside_of_fusions_is_hidden_by_them_as_far_as_they_last():
    piece = (
        "%piece.NUMBER (x: bf16[4000000]) -> bf16[32000000] {\n  %x = bf16[4000000]{0} parameter(0)\n"
        f'  ROOT %g = bf16[32000000]{{0}} all-gather(%x), {GROUPS}, frontend_attributes={{chain_id="7"}}\n}}\n\n'
    )
    pieces = "".join(piece.replace("NUMBER", str(number)) for number in (1, 2))
    short, long = (
        found(
            f"  %f = bf16[8,8]{{1,0}} fusion(%w), calls=%piece.1, {cycles(each)}\n"
            f"  ROOT %h = bf16[8,8]{{1,0}} fusion(%w), calls=%piece.2, {cycles(each)}",
            pieces,
        )
        for each in (1500, MILLISECOND)
    )
    assert short.network == pytest.approx(GATHER - 2e-6) and long.network == 0.0


@pytest.mark.parametrize(
    ("name", "devices", "members", "rate"),
    [
        ("v5e:2x4", 8, 8, 100e9),
        ("v5e:16x16", 256, 256, 200e9),
        ("v5e:16x16", 256, 16, 100e9),
        ("v5p:2x2x1", 4, 4, 200e9),
        ("v5p:4x4x4", 64, 64, 600e9),
        # Two devices a chip share its links.
        ("v3:2x2", 8, 8, 82e9),
    ],
)
def test_a_device_has_the_links_that_its_slice_gives_it(name, devices, members, rate):
    assert described(name, devices).ring_rate(members) == pytest.approx(rate)


def test_a_gpu_has_all_its_links_and_no_estimate():
    gpu = described("h100:8", 8)
    assert gpu.ring_rate(8) == 450e9
    assert (
        step_time(hlo.parse(HEAD + "ENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n"), gpu)
        is None
    )
