from tests.kernels.check_sm90 import check_variants, patient


@patient
def test_linears_with_16_bit_and_int4_weights() -> None:
    check_variants("compile_sm90_linear", at_least=40)
