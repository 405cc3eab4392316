"""The demo: prefill in one process, decode in others, the KV between them only in the store.

It proves that what the store gives back is what an engine needs: real forward passes of a small Llama,
and exactly the tokens of a run without the store. It is neither an engine (one request, no batching, no
scheduler) nor a measure of the store's speed: on one CPU thread the forward pass is nearly all of the time.

`model` is the Llama, `blocks` the way its KV goes to and from the store, `roles` what each process does,
`verdict` the comparison of their reports, `daemon` the store's process, `__main__` the order of events.
"""
