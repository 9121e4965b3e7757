"""The two ends of a step: from the plan to the inputs of the forward pass, from its logits to the
result.
"""
