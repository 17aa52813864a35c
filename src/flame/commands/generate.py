"""`flame generate`: continues a text with an exported model, or with a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from flame.errors import Exit, ModelError
from flame.exports import exported, own_tokenizer
from flame.models.export import load_exported
from flame.models.families.own import OWN_FILE, continued


def generate(model: str, prompt: str, tokens: int, temperature: float, seed: int) -> Exit:
    """Prints the prompt and its continuation."""
    with exported(Path(model)) as folder:
        print(continuation(folder, prompt, tokens, temperature, seed))
    return Exit.DONE


def continuation(path: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and up to `tokens` tokens more, by transformers' own `generate`."""
    disable_progress_bar()  # transformers draws one for every load
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = cast("Any", load_exported(path)).to(device).eval()
    if (path / OWN_FILE).is_file():
        return own_continuation(path, model, prompt, tokens, temperature, seed)
    make: Any = AutoTokenizer.from_pretrained
    tokenizer = make(str(path), trust_remote_code=False)
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    if encoded.input_ids.shape[1] == 0:
        raise ModelError("the prompt has no tokens: give a text of at least one character")
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(
            **encoded,
            max_new_tokens=tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.eos_token_id,
        )
    return cast("str", tokenizer.decode(out[0], skip_special_tokens=True))


def own_continuation(
    path: Path, model: torch.nn.Module, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """The same for a model of one's own, which has no cache, by the tokenizer that it was trained with."""
    tokenizer = own_tokenizer(path)
    ids = torch.from_numpy(tokenizer.encode([prompt])[0][:-1]).long()  # without EOS
    if len(ids) == 0:
        raise ModelError("the prompt has no tokens: give a text of at least one character")
    device = next(model.parameters()).device
    return tokenizer.decode(
        continued(model, ids.to(device), tokens, temperature, seed, tokenizer.eos_id).tolist()
    )
