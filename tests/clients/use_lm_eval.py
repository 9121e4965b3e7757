"""lm-eval's API models: log likelihoods and texts of `local-completions` with the server's own tokenizer,
texts of `local-chat-completions`.
"""

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from served import CAPITAL, MODEL, REAL

completions = LocalCompletionsAPI(
    model=MODEL, base_url=REAL + "/v1/completions", tokenizer_backend="remote", num_concurrent=1, max_retries=1,
    max_length=1024,
)  # fmt: skip
pairs = [("The capital of France is", " Paris"), ("The capital of France is", " cheese")]
requests = [
    Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)
]
(paris, _), (cheese, greedy) = completions.loglikelihood(requests)
assert 0 > paris > cheese and not greedy, (paris, cheese)
until = Instance(
    request_type="generate_until", doc={}, idx=0,
    arguments=("1, 2, 3, 4, 5,", {"until": [" 8"], "max_gen_toks": 16, "temperature": 0}),
)  # fmt: skip
assert completions.generate_until([until])[0].startswith(" 6, 7,")

chat = LocalChatCompletion(
    model=MODEL, base_url=REAL + "/v1/chat/completions", num_concurrent=1, max_retries=1, tokenizer_backend=None
)
asked = chat.apply_chat_template([{"role": "user", "content": CAPITAL}])
until = Instance(
    request_type="generate_until", doc={}, idx=0,
    arguments=(asked, {"until": ["\n\n"], "max_gen_toks": 32, "temperature": 0}),
)  # fmt: skip
assert "Paris" in chat.generate_until([until])[0]
