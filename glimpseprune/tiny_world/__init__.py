"""A small world in which visual-token pruning can be trained and measured without downloads.

Page images with questions, answers and evidence boxes come from a generator, and a tiny
Qwen2.5-VL model learns to read them from nothing. See `pages` for the generator, `asking` for the
questions, `dataset` for the files it writes, `vocabulary` for the tokenizer and the processor,
`training` for the training and `accuracy` for the measurement.
"""
