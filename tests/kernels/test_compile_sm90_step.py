from tests.kernels.check_sm90 import check_variants, patient


@patient
def test_prepare_and_sample() -> None:
    check_variants("compile_sm90_step", at_least=60)
