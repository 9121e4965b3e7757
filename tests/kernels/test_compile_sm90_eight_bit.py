from tests.kernels.check_sm90 import check_variants, patient


@patient
def test_linears_with_8_bit_weights() -> None:
    check_variants("compile_sm90_eight_bit", at_least=60)
