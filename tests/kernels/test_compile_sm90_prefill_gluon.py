from tests.kernels.check_sm90 import check_variants, patient


@patient
def test_prefill_attention_in_gluon() -> None:
    check_variants("compile_sm90_prefill_gluon", at_least=13)
