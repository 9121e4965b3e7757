from tests.kernels.check_sm90 import check_variants, patient


@patient
def test_norms_activations_and_rotary() -> None:
    check_variants("compile_sm90_pointwise", at_least=45)
