"""benchmarks/stability.py: its result, and its default variant against the toolkit's encoder."""

import stability
import torch
from PIL import Image
from stability_variants import Variant, build_model

from simmim.encoders.swinv2 import SwinV2


def test_the_benchmark_finds_less_growth_with_post_norm(tmp_path, capsys):
    assert stability.main(["--quick", "--out", str(tmp_path / "picture.png")]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line]
    header, rows = lines[0], lines[2:9]
    assert header[0] == "norm" and header[6] == "last / first" and header[-1] == "diverged"
    growth = {(row[0], tuple(row[1:4])): float(row[6]) for row in rows}
    compared = [(growth["pre", shape], growth["post", shape]) for norm, shape in growth if norm == "pre"]
    assert len(compared) == 3 and all(post < 0.8 * pre for pre, post in compared)
    assert sum("windows grow" in row[0] for row in lines) == 3 and sum("cosine" in row[0] for row in lines) == 2
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size > (800, 600)


def test_the_default_variant_is_the_toolkits_encoder():
    """The default variant equals `SwinV2`, with padding and at other windows than in training; the others differ."""
    images = torch.randn(2, 3, 48, 40)
    for depths in ((2, 2), (2,)):
        model = build_model(Variant(), 16, depths, 3).encoder
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        stock = SwinV2(model.config)
        stock.load_state_dict(model.state_dict())
        for window in (4, 6):
            for block in (*model.blocks(), *stock.blocks()):
                block.window_size, block.pretrained_window = window, 4
            with torch.no_grad():
                torch.testing.assert_close(model(images).features, stock(images).features)
    for change in ({"norm": "pre"}, {"attention": "dot"}, {"bias": "table"}, {"bias": "linear"}):
        other = build_model(Variant(**change), 16, (2,), 3).encoder
        other.load_state_dict(stock.state_dict(), strict=False)
        for block in other.blocks():
            block.window_size, block.pretrained_window = 6, 4
        with torch.no_grad():
            assert (other(images).features - stock(images).features).abs().max() > 0.01, change
