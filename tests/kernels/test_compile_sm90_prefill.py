from tests.kernels.check_sm90 import check_variants, patient


@patient
def test_prefill_attention() -> None:
    check_variants("compile_sm90_prefill", at_least=15)
