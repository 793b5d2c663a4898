"""The chat page in a browser against `nemojax serve` itself, in a process of its own."""

import time

import pytest

from tests.serve.browser import answered, ask, chromium, opening_pages
from tests.serve.live import serving
from tests.serve.stub import WAIT

QUESTION = "one and two"
KEY = {"Authorization": "Bearer s3cret"}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_page(browser):
    with opening_pages(browser) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny model that, asked greedily, goes on for as long as its context lasts."""
    import jax

    from nemojax.arch import uniform
    from nemojax.checkpoints.artifact import save_params
    from nemojax.data.chat import encode_prompt
    from nemojax.data.tokenizer import train_tokenizer
    from nemojax.generate.completions import generate
    from nemojax.generate.sampling import SamplingConfig
    from nemojax.model.llama import init_params

    folder = tmp_path_factory.mktemp("talker")
    tokenizer = train_tokenizer(["one and two make three " * 20], 280, folder / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=64,
        context=4096,
    )
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}], thinking=False)
    for seed in range(20):
        params = init_params(arch, jax.random.key(seed))
        greedy = SamplingConfig(temperature=0, max_new_tokens=400)
        (done,) = generate(params, arch, [prompt], jax.random.key(0), greedy, tokenizer.eos_ids)
        if not done.finished and tokenizer.decode(done.tokens).strip("\N{REPLACEMENT CHARACTER}"):
            return save_params(folder / "tiny", arch, params, tokenizer_dir=folder / "tokenizer")
    raise AssertionError("every one of these models ends its answer by itself")


@pytest.mark.slow
def test_a_key_an_answer_and_a_stop_that_frees_the_slot(new_page, talker, cache, tmp_path):
    (tmp_path / "keys").write_text("s3cret\n")
    with serving(talker, cache, f"--api_key_file={tmp_path / 'keys'}") as live:
        page = new_page(f"{live.url}/")
        page.get_by_text("An API key is needed").wait_for()
        page.get_by_label("API key").fill("s3cret")
        page.get_by_label("API key").press("Tab")
        page.locator("#model", has_text="tiny").wait_for()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("20")
        page.get_by_role("switch", name="Reasoning").uncheck()
        ask(page, QUESTION)
        done = answered(page)
        assert not done.locator(".error").is_visible(), done.inner_text()
        told = done.locator(".foot").inner_text()
        assert told.startswith("20 tokens") and "cut at the limit of tokens" in told
        first = done.locator(".answer").inner_text()
        page.get_by_role("button", name="Regenerate").click()
        assert answered(page).locator(".answer").inner_text() == first != ""  # greedy
        page.get_by_label("Max tokens").fill("4000")
        page.get_by_role("button", name="New conversation").click()
        ask(page, QUESTION)
        page.locator(".answer > *").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        assert "stopped" in answered(page).locator(".foot").inner_text()
        until = time.monotonic() + WAIT
        while (left := live.metrics(KEY))["sequences_running"] and time.monotonic() < until:
            time.sleep(0.05)
        assert left["sequences_running"] == 0 and left["generated_tokens_total"] < 3000, left
        page.get_by_label("Max tokens").fill("5000000")  # what the server thinks of that
        ask(page, "more")
        assert "The server answered 400" in answered(page).locator(".error").inner_text()


@pytest.mark.slow
def test_reasoning_on_and_off(new_page, server):
    page = new_page(f"{server.url}/")
    page.locator("#model", has_text="tiny/model").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("30")
    page.get_by_label("Temperature").fill("0")
    ask(page, QUESTION)
    done = answered(page)
    assert done.locator("summary").inner_text().endswith(" s, 30 tokens"), done.inner_text()
    assert done.locator("details .text").text_content() and not done.locator(".answer").inner_text()
    assert "no answer after the thinking" in done.locator(".foot").inner_text()
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("switch", name="Reasoning").uncheck()
    ask(page, QUESTION)
    done = answered(page)
    assert done.locator(".answer").inner_text() and not done.locator("details").is_visible()
