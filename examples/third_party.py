"""An adapter and a scorer of another package: install it, and use both by name.

The package is `examples/third_party_package`. It is installed into a temporary folder here; on your
machine `pip install` it where tokenprune is.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent / "third_party_package"

USE = """
import sys, tokenprune, torch
from tokenprune_contrast.tower import Tower

print("adapters:", *(name for name in tokenprune.list_adapters() if "contrast" in name))
print("recipes:", *(name for name in tokenprune.list_recipes() if "contrast" in name))

torch.manual_seed(0)
host = Tower().eval()
model = tokenprune.wrap(host, "contrast-k0.5").eval()
print(tokenprune.verify(model))
points = torch.randn(2, 24, 16)
with torch.no_grad():
    out, trace = model(points, return_trace=True)
print("tokens:", *(stage.num_tokens for stage in trace.stages))
tokenprune.save(model, sys.argv[1])
torch.save((points, out), sys.argv[1] + "/wanted.pt")
"""

# A new process, which imports nothing of the package: the saved recipe names the scorer.
LOAD = """
import sys, tokenprune, torch, timm
from tokenprune_contrast.tower import Tower

model = tokenprune.load(sys.argv[1], Tower()).eval()
points, wanted = torch.load(sys.argv[1] + "/wanted.pt")
with torch.no_grad():
    print("loaded, the same output:", torch.equal(model(points), wanted))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4)
    pruned = tokenprune.wrap(vit, "contrast-k0.7").eval()
    print("on a ViT of timm:", tuple(pruned(torch.randn(2, 3, 32, 32)).shape))
"""

with tempfile.TemporaryDirectory() as name:
    site, saved = Path(name) / "site", Path(name) / "saved"
    # --no-deps and --no-build-isolation: all that it needs is here, and nothing is downloaded.
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    build = Path(name) / "package"
    shutil.copytree(PACKAGE, build)  # a build writes into its folder
    subprocess.run([sys.executable, *install, "--target", str(site), str(build)], check=True)

    shown = ""
    for code in (USE, LOAD):
        start = f"import sys; sys.path.insert(0, {str(site)!r})\n"
        command = [sys.executable, "-c", start + code, str(saved)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="")
        shown += done.stdout

for wanted in (
    "adapters: tokenprune-contrast/tower",
    "recipes: contrast-k0.7",
    "tokens: 12 6",
    "loaded, the same output: True",
    "on a ViT of timm: (2, 1000)",
):
    if wanted not in shown:
        raise SystemExit(f"the package was not found: {wanted!r} was not said")
