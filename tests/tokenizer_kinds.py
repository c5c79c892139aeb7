"""Tiny tokenizers of the kinds that checkpoints come with: their start tokens, and what they add by themselves."""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

VOCABULARY = 264
MERGE = ("b", "c")


@dataclass(frozen=True)
class Kind:
    """special: tokens from id 0 on; template: what the tokenizer adds; configured: BOS by the model's config."""

    special: tuple[str, ...]
    bos: str | None
    eos: str | None
    template: str = "$A"
    configured: int | None = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token per byte, one for "bc", and the special ones."""
        tokens = [*self.special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(MERGE)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        assert len(vocabulary) <= VOCABULARY
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[MERGE]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in self.special])
        ids = list(zip(self.special, range(len(self.special)), strict=True))
        tokenizer.post_processor = TemplateProcessing(single=self.template, special_tokens=ids)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=self.bos, eos_token=self.eos)


_END, _TURN = "<|endoftext|>", "<|im_end|>"
KINDS = {
    "llama": Kind(("<s>", "</s>"), "<s>", "</s>", "<s> $A"),
    "gemma": Kind(("<pad>", "<eos>", "<bos>"), "<bos>", "<eos>", "<bos> $A", configured=2),
    "opt": Kind(("<s>", "<pad>", "</s>"), "</s>", "</s>", "</s> $A", configured=2),
    "gpt2": Kind((_END,), _END, _END, configured=0),
    "qwen": Kind((_END, "<|im_start|>", _TURN), None, _END, configured=0),
    "qwen chat": Kind((_END, "<|im_start|>", _TURN), None, _TURN, configured=0),
    "glm": Kind((_END, "[gMASK]", "<sop>"), None, _END, "[gMASK] <sop> $A"),
}
"""Kinds that add nothing behind a text."""

ENDING = {
    "bert": Kind(("<s>", "</s>"), "<s>", "</s>", "<s> $A </s>"),
    "t5": Kind(("<pad>", "</s>"), None, "</s>", "$A </s>"),
}
"""Kinds that add EOS behind a text."""
