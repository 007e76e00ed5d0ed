"""Load a pruned model as any other, count its zeros and let it write.

python examples/use_the_result.py run/model "The patient"
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load, count, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a pruned model")
    parser.add_argument("prompt", help="beginning of a text")
    parser.add_argument("--new-tokens", type=int, default=20, help="tokens to write")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    print(f"{zeros:,} of {model.num_parameters():,} parameters are zero")

    inputs = tokenizer(args.prompt, return_tensors="pt")
    written = model.generate(
        **inputs,
        max_new_tokens=args.new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
