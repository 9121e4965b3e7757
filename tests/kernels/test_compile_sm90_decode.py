from tests.kernels.check_sm90 import check_variants, patient


@patient
def test_decode_attention() -> None:
    check_variants("compile_sm90_decode", at_least=26)
