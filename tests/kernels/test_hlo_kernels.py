"""What is counted of a compiled program: launches, their bytes, and where they lie."""

from __future__ import annotations

from scripts.hlo_kernels import launches

PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused_write (p0: bf16[64,2,16,128], p1: f32[8,512], p2: s32[8,2]) -> bf16[64,2,16,128] {
  %p0 = bf16[64,2,16,128]{3,2,1,0} parameter(0)
  %p1 = f32[8,512]{1,0} parameter(1)
  %p2 = s32[8,2]{1,0} parameter(2)
  %convert = bf16[8,512]{1,0} convert(%p1), metadata={op_name="x"}
  %bitcast = bf16[8,4,128]{2,1,0} bitcast(%convert)
  %slice = bf16[8,2,128]{2,1,0} slice(%bitcast), slice={[0:8], [0:2], [0:128]}
  ROOT %scatter = bf16[64,2,16,128]{3,2,1,0} scatter(%p0, %p2, %slice), to_apply=%region
}

%product (q0: bf16[8,64], q1: bf16[512,64]) -> f32[8,512] {
  %q0 = bf16[8,64]{1,0} parameter(0)
  %q1 = bf16[512,64]{1,0} parameter(1)
  ROOT %dot = f32[8,512]{1,0} dot(%q0, %q1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%gathered (g0: f32[1000,16], g1: s32[4]) -> f32[4,16] {
  %g0 = f32[1000,16]{1,0} parameter(0)
  %g1 = s32[4]{0} parameter(1)
  ROOT %gather = f32[4,16]{1,0} gather(%g0, %g1), offset_dims={1}
}

%yes (y0: f32[8,512]) -> f32[8,512] {
  %y0 = f32[8,512]{1,0} parameter(0)
  ROOT %copy.1 = f32[8,512]{1,0} copy(%y0)
}

%no (n0: f32[8,512]) -> f32[8,512] {
  ROOT %n0 = f32[8,512]{1,0} parameter(0)
}

ENTRY %main (a0: bf16[8,64], a1: bf16[512,64], a2: bf16[64,2,16,128], a3: s32[8,2], a4: pred[]) -> f32[8,512] {
  %a0 = bf16[8,64]{1,0} parameter(0)
  %a1 = bf16[512,64]{1,0} parameter(1)
  %a2 = bf16[64,2,16,128]{3,2,1,0} parameter(2)
  %a3 = s32[8,2]{1,0} parameter(3)
  %a4 = pred[] parameter(4)
  %a5 = f32[1000,16]{1,0} parameter(5)
  %gemm = f32[8,512]{1,0} fusion(%a0, %a1), kind=kCustom, calls=%product, metadata={op_name="layer/qkv"}
  %write = bf16[64,2,16,128]{3,2,1,0} fusion(%a2, %gemm, %a3), kind=kInput, calls=%fused_write
  %attend = (f32[8,512]{1,0}, f32[8]{0}) custom-call(%gemm, %write), custom_call_target="mosaic_gpu_v2"
  %out = f32[8,512]{1,0} get-tuple-element(%attend), index=0
  %index = s32[4]{0} constant({1, 2, 3, 4})
  %rows = f32[4,16]{1,0} fusion(%a5, %index), kind=kLoop, calls=%gathered
  ROOT %cond = f32[8,512]{1,0} conditional(%a4, %out, %out), true_computation=%yes, false_computation=%no
}
"""


def test_launches_have_the_bytes_that_their_results_need() -> None:
    found = {each.name: each for each in launches(PROGRAM, "[64,2,16,128]")}
    assert {name: (each.kind, each.read, each.written) for name, each in found.items()} == {
        "gemm": ("product", 8 * 64 * 2 + 512 * 64 * 2, 8 * 512 * 4),
        "write": ("fusion", 8 * 256 * 4 + 8 * 2 * 4, 8 * 256 * 2),     # half of the row's columns; the pool in place
        "attend": ("kernel", 8 * 512 * 4, 8 * 512 * 4 + 8 * 4),
        "rows": ("fusion", 4 * 16 * 4 + 4 * 4, 4 * 16 * 4),
        "copy.1": ("copy", 8 * 512 * 4, 8 * 512 * 4),
    }
    assert found["gemm"].scope == "layer/qkv"
    assert found["copy.1"].path == ("conditional 0  yes",) and not found["write"].path
