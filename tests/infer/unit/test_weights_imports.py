"""What the client side needs of models comes without torch."""

from __future__ import annotations

import subprocess
import sys


def test_tokenizer_store_and_import_load_no_torch() -> None:
    code = (
        "import sys, lattica_infer.model.text, lattica_infer.weights.store, lattica_infer.model.sources\n"
        "print([name for name in ('torch', 'transformers', 'libp2p') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
