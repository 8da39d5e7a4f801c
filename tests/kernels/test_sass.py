"""Descriptors of matrix instructions that come from somewhere else, in code written by hand.

It is written as cuobjdump prints it; the address of shared memory starts from SR_CgaCtaId.
"""

import pytest

from zoo.kernels.bench import sass

# R9 is the address of shared memory, UR4:5 the descriptor of A and UR6:7 that of B.
ADDRESS = ["S2R R8, SR_CgaCtaId", "MOV R9, 0x400", "LEA R9, R8, R9, 0x18"]
A = ["SHF.R.U32.HI R10, RZ, 0x4, R9", "R2UR UR4, R10", "UMOV UR5, 0x40000040"]
B = ["IADD3 R11, P0, R10, 0x20, RZ", "R2UR UR6, R11", "UMOV UR7, 0x40000040"]
PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4].tnspA, R24, gsb0"
END = ["EXIT"]


def code(*lines):
    """The text of a kernel; every instruction takes 16 bytes."""
    text = ["\tFunction : _scan", "\t.headerflags\t@EF_CUDA_SM90"]
    for i, line in enumerate(lines):
        text.append(
            f"        /*{16 * i:04x}*/                   {line} ;      /* 0x000000ff00047224 */"
        )
        text.append("                                                     /* 0x000fe200078e0003 */")
    return "\n".join(text)


def stray(*lines):
    return sass.stray_descriptors(sass.instructions(code(*lines)))


def test_reads_what_cuobjdump_prints():
    (conditional, wide) = sass.instructions(code("@!P0 BRA `(.L_x_1)", "LDG.E.64 R2, [R4.64+0x8]"))
    assert conditional.is_conditional and conditional.operation == "BRA"
    assert wide == (16, False, "LDG.E.64", ["R2", "[R4.64+0x8]"])
    assert sass.written(wide) == ["R2", "R3"]
    assert sass.registers(wide.operands[1]) == ["R4", "R5"]
    assert sass.registers("R42.reuse") == ["R42"] and sass.registers("-UR4") == ["UR4"]


def test_descriptors_from_the_address():
    assert stray(*ADDRESS, *A, *B, PRODUCT, *END) == []


def test_a_descriptor_made_before_its_address():
    """What the assembler did: R11 from an R10 that still is the number of tokens."""
    lines = ["LDC R10, c[0x0][0x240]", *B, *ADDRESS, *A, PRODUCT, *END]
    assert stray(*lines) == [(16 * lines.index(PRODUCT), "UR6")]


def test_operands_in_registers_have_no_descriptor():
    product = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], RZ, !UPT"
    assert stray(*ADDRESS, A[0], *B, product, *END) == []
    assert [name for _, name in stray(*ADDRESS, *A, product, *END)] == ["UR6"]


STEP = "UIADD3.64 UR4, UR4, 0x80, URZ"  # both halves, from both
LOST = "R2UR UR4, R50"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([PRODUCT, STEP], []),
        # The second turn of the loop, and the place after it.
        ([PRODUCT, LOST], ["UR4"]),
        ([PRODUCT, "@P1 R2UR UR4, R50"], ["UR4"]),
        # Lost, but found again before it is used.
        ([*A, PRODUCT, LOST], []),
        (["STL [R1+0x8], R10", "MOV R10, RZ", "LDL R10, [R1+0x8]", *A[1:], PRODUCT], []),
        (["STL [R1+0x8], R50", "LDL R10, [R1+0x8]", *A[1:], PRODUCT], ["UR4"]),
    ],
)
def test_loops_and_places_on_the_stack(body, expected):
    before = [*ADDRESS, *A, *B]
    found = stray(*before, *body, f"@P0 BRA 0x{16 * len(before):x}", *END)
    assert [name for _, name in found] == expected


def test_both_sides_of_a_branch():
    """The descriptor must be there whichever way the program came."""
    start = [*ADDRESS, "MOV R10, R50", *B[1:]]
    product = len(start) + 3
    taken = [*start, f"@P0 BRA 0x{16 * product:x}", *A[:2], PRODUCT, *END]
    assert [name for _, name in stray(*taken)][0] == "UR4"


def test_an_accumulator_ends_what_a_register_held():
    product = "HGMMA.64x16x16.F32.BF16 R4, gdesc[UR4], RZ, !UPT"
    lines = [*ADDRESS, *A, "IADD3 R11, R10, 0x20, RZ", "R2UR UR6, R11"]
    again = ["R2UR UR6, R11", product, *END]
    assert [name for _, name in stray(*lines, product, *again)] == ["UR6"]
