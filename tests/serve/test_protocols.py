"""The protocols of trainers and engines against the application: recorded requests, answers of their exact shape.

The shapes are those of OpenRLHF 0.11, vLLM 0.33, SGLang 0.5.23, verl 0.10, slime 0.3.1 and R1-Reward.
"""

import base64
import json
import math

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from fastrm.data.sources.layouts.groups import group_record
from fastrm.evaluate.ensemble import Ensemble
from fastrm.serve.app import make_app
from fastrm.serve.protocols import openrlhf, r1_reward, sglang, slime, vllm
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.support import make_image

IMAGE, OTHER = (
    "data:image/png;base64," + base64.b64encode(make_image(*size).data).decode() for size in ((84, 56), (56, 56))
)
SEEN = {"prompt": "Is this a cat?", "images": [IMAGE], "responses": ["a red dog", "no"]}
READ = {"prompt": "the cat sits", "responses": ["on a dog", "so"]}
END = "<|im_end|>\n"


@pytest.fixture(scope="module")
def client(model):
    scheduler = Scheduler([Scorer("tiny", Ensemble([model]), 8192)])
    with TestClient(make_app(scheduler, ServeSettings()), "http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def post(client):
    def post(path, body, status=200):
        answer = client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    return post


@pytest.fixture(scope="module")
def seen(model):
    return model.score([SEEN])[0]


@pytest.fixture(scope="module")
def read(model):
    return model.score([READ])[0]


def rendered(model, group, number, end=END, num_pads=1):
    """A conversation as a trainer renders it, images as runs of `num_pads` placeholders."""
    parts = [{"type": "image"} for _ in group.get("images", [])]
    content = [*parts, {"type": "text", "text": group["prompt"]}] if parts else group["prompt"]
    text = model.network.encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text.replace("<|image_pad|>", "<|image_pad|>" * num_pads) + group["responses"][number] + end


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# OpenRLHF


def test_get_reward_answers_one_query_as_openrlhf_reads_it(model, post, read):
    query = rendered(model, READ, 0, "<|im_end|>")
    body = {"query": [query], "prompts": [query.partition("on a dog")[0]], "labels": [{"gold": 3}]}
    answer = post("/get_reward", body)
    assert answer == {
        "rewards": [pytest.approx(read[0], abs=1e-6)],
        "scores": [pytest.approx(sigmoid(read[0]))],
        "extra_logs": {"reward": answer["rewards"], "cut": [0.0]},
    }


def test_get_reward_answers_empty_lists(post):
    answer = post("/get_reward", {"query": [], "prompts": [], "labels": []})
    assert answer == {"rewards": [], "scores": [], "extra_logs": {"reward": [], "cut": []}}


def test_get_reward_takes_many_queries_and_tells_cut_ones(model, post, read, seen):
    queries = [rendered(model, READ, 1), rendered(model, SEEN, 0, "", num_pads=6), rendered(model, READ, 0)]
    labels = ["gold", {"answer": None, "images": [IMAGE]}, 7.5]
    answer = post("/get_reward", {"query": queries, "prompts": ["x"] * 3, "labels": labels})
    assert answer["rewards"] == pytest.approx([read[1], seen[0], read[0]], abs=1e-6)
    assert answer["extra_logs"]["cut"] == [0.0, 1.0, 0.0]


def test_get_reward_refuses_an_image_that_was_not_sent_and_one_too_many(model, post):
    query = rendered(model, SEEN, 0, num_pads=6)
    assert post("/get_reward", {"query": [query]}, 422)["error"]["code"] == "IMAGE_COUNT"
    body = {"query": [query], "labels": [{"images": [IMAGE, OTHER]}]}
    assert "1 image placeholders, and 2 images" in post("/get_reward", body, 422)["error"]["message"]


def test_get_reward_refuses_another_template_with_the_place(post):
    query = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>human\nHi<|im_end|>\n<|im_start|>assistant\nHo"
    error = post("/get_reward", {"query": ["a", query]}, 422)["error"]
    assert error["code"] == "RENDERED_TEXT" and error["message"].startswith("query[0]: differs from")
    assert "at character 27," in post("/get_reward", {"query": [query]}, 422)["error"]["message"]


@pytest.mark.parametrize(
    "body, place",
    [
        ({}, '"query": Field required'),
        ({"query": "text"}, '"query": '),
        ({"query": ["a", 1]}, '"query.1": '),
        ({"query": ["a"], "labels": [1, 2]}, '"labels" has 2 entries and "query" 1'),
        ({"query": ["a"], "labels": [{"images": [1]}]}, '"labels[0].images[0]" is 1'),
        ({"query": ["a"], "image": "x"}, '"image": Extra inputs'),
    ],
)
def test_get_reward_names_what_is_wrong(post, body, place):
    error = post("/get_reward", body, 400)["error"]
    assert error["code"] == "BAD_REQUEST" and place in error["message"]


# R1-Reward


def test_get_reward_mllm_takes_images_from_the_messages_beside_a_query(model, post, read, seen):
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": SEEN["prompt"]}]
    prompts = [json.dumps([{"role": "user", "content": content}]), READ["prompt"]]
    queries = [rendered(model, SEEN, 1, "<|im_end|>", num_pads=6), rendered(model, READ, 1, "<|im_end|>")]
    answer = post("/get_reward_mllm", {"query": queries, "prompts": prompts})
    assert answer == {"rewards": pytest.approx([seen[1], read[1]], abs=1e-6)}
    assert post("/get_reward_mllm", {"query": queries[:1], "prompts": ["[]"]}, 422)["error"]["code"] == "IMAGE_COUNT"


# vLLM and verl


def chat(group, number):
    images = [{"type": "image_url", "image_url": {"url": image}} for image in group.get("images", [])]
    content = [*images, {"type": "text", "text": group["prompt"]}] if images else group["prompt"]
    said = group["responses"][number]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": said}]


def check_listing(answer, prefix, model_name="tiny"):
    assert answer.pop("id").startswith(prefix) and answer.pop("created") > 1.7e9
    assert answer.pop("object") == "list" and answer.pop("model") == model_name
    usage = answer.pop("usage")
    assert usage.pop("prompt_tokens") == usage.pop("total_tokens") > 0
    assert usage == {"completion_tokens": 0, "prompt_tokens_details": None}
    return answer


def test_classify_answers_verl_with_the_raw_reward(model, post, read):
    body = {"model": "tiny", "input": rendered(model, READ, 0), "use_activation": False}
    answer = post("/classify", body)
    assert answer["data"][-1]["probs"][-1] == pytest.approx(read[0], abs=1e-6)
    data = [{"index": 0, "label": "LABEL_0", "probs": answer["data"][0]["probs"], "num_classes": 1}]
    assert check_listing(answer, "classify-") == {"data": data}


def test_classify_counts_the_tokens_of_the_conversation(model, post):
    text = rendered(model, READ, 0)
    tokens = model.network.encoder.tokenizer(text)["input_ids"]
    assert post("/classify", {"input": text})["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
@pytest.mark.parametrize("group", [SEEN, READ], ids=["image", "text"])
@pytest.mark.parametrize(
    "keys, is_sigmoid",
    [({}, False), ({"use_activation": False}, False), ({"use_activation": True}, True), ({"activation": True}, True)],
)
def test_messages_give_the_reward_and_its_sigmoid_only_where_it_is_asked_for(
    model, post, path, group, keys, is_sigmoid
):
    answer = post(path, {"messages": chat(group, 1), "add_generation_prompt": False, **keys})
    (entry,) = answer["data"]
    wanted = model.score([group])[0][1]
    found = entry["probs"] if path == "/classify" else entry["data"]
    assert found == [pytest.approx(sigmoid(wanted) if is_sigmoid else wanted, abs=1e-6)]


def test_pooling_has_the_shape_of_vllm(model, post, read):
    answer = post("/pooling", {"input": [rendered(model, READ, n) for n in (0, 1)], "task": "classify"})
    data = [{"index": n, "object": "pooling", "data": [pytest.approx(read[n], abs=1e-6)]} for n in (0, 1)]
    assert check_listing(answer, "pool-") == {"data": data}


def test_classify_takes_tokens(model, post, read):
    tokens = [model.network.encoder.tokenizer(rendered(model, READ, n))["input_ids"] for n in (0, 1)]
    one, many = post("/classify", {"input": tokens[0]}), post("/classify", {"input": tokens})
    assert [entry["probs"][0] for entry in one["data"] + many["data"]] == pytest.approx([read[0], *read], abs=1e-6)


def test_classify_refuses_image_placeholders_without_images(model, post):
    error = post("/classify", {"input": rendered(model, SEEN, 0)}, 422)["error"]
    assert error["code"] == "IMAGE_COUNT" and error["message"].startswith("input: has 1 image placeholders, and 0")


@pytest.mark.parametrize(
    "keys",
    [
        {"add_generation_prompt": True}, {"continue_final_message": True}, {"chat_template": "{{ 1 }}"},
        {"truncate_prompt_tokens": 10}, {"use_activation": "false"}, {"softmax": True}, {"task": "embed"},
        {"mm_processor_kwargs": {"max_pixels": 1}},
    ],
    ids=lambda keys: next(iter(keys)),
)  # fmt: skip
def test_keys_that_would_change_the_conversation_are_refused(post, keys):
    error = post("/classify", {"messages": chat(READ, 0), **keys}, 400)["error"]
    assert error["code"] == "BAD_REQUEST" and next(iter(keys)) in error["message"]


def test_classify_refuses_a_conversation_without_an_answer(post):
    error = post("/classify", {"messages": chat(READ, 0)[:1]}, 400)["error"]
    assert "whose last message is the assistant's" in error["message"]
    assert post("/classify", {"messages": []}, 400)["error"]["code"] == "BAD_REQUEST"


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names", [("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"), ("queries", "items")], ids=str
)
def test_score_takes_one_query_with_many_documents_as_a_group(post, read, path, names):
    query, documents = names
    answer = post(path, {"model": "tiny", query: READ["prompt"], documents: READ["responses"]})
    data = [{"index": n, "object": "score", "score": pytest.approx(read[n], abs=1e-6)} for n in (0, 1)]
    assert check_listing(answer, "score-") == {"data": data}


def test_score_takes_content_parts_and_pairs(post, seen, read):
    image = {"type": "image_url", "image_url": {"url": IMAGE}}
    query = {"content": [image, {"type": "text", "text": SEEN["prompt"]}]}
    body = {"queries": query, "documents": SEEN["responses"], "use_activation": True}
    assert [entry["score"] for entry in post("/score", body)["data"]] == pytest.approx(list(map(sigmoid, seen)))
    said = {"content": [{"type": "text", "text": READ["responses"][1]}]}
    pairs = post("/score", {"queries": [query, READ["prompt"]], "documents": [SEEN["responses"][0], said]})
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx([seen[0], read[1]], abs=1e-6)
    assert (
        "2 queries and 3 documents"
        in post("/score", {"queries": ["a"] * 2, "documents": ["b"] * 3}, 400)["error"]["message"]
    )
    assert post("/score", {"queries": "a", "documents": {"content": [image]}}, 400)["error"]["code"] == "BAD_REQUEST"


def test_texts_that_look_like_placeholders_of_data_sets_are_texts(model, post):
    said = {"prompt": "the <<image>> and", "responses": ["a <<image>>", "<<<image>>>"]}  # as a data set writes <image>
    wanted = model.score([said])[0]
    answer = post("/score", {"queries": "the <image> and", "documents": ["a <image>", "<<image>>"]})
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(wanted, abs=1e-6)
    query = rendered(model, {"prompt": "the <image> and", "responses": ["a <image>"]}, 0)
    assert post("/get_reward", {"query": [query]})["rewards"] == pytest.approx(wanted[:1], abs=1e-6)


@pytest.mark.parametrize("body", [{"messages": chat(READ, 0)}, {"input": "a"}], ids=["messages", "input"])
@pytest.mark.parametrize("is_new", [True, False])
def test_two_names_of_the_activation_that_differ_are_refused(post, body, is_new):
    error = post("/classify", {**body, "use_activation": is_new, "activation": not is_new}, 400)["error"]
    assert error["code"] == "BAD_REQUEST" and "use_activation and activation" in error["message"]


CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}


def test_tool_calls_of_the_last_message_are_not_left_out():
    body = vllm.ChatInput(messages=[*chat(READ, 0)[:1], {"role": "assistant", "content": "so", "tool_calls": [CALL]}])
    [group] = vllm.groups(body, None)
    [message] = [response.messages[-1] for response in group_record(group, 0).responses]
    assert message.text == "so" and json.loads(message.fields) == {"tool_calls": [CALL]}


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
def test_a_key_that_the_template_does_not_render_is_refused_in_the_last_message(post, path):
    *prompt, last = chat(READ, 0)
    error = post(path, {"messages": [*prompt, {**last, "mood": "sad"}]}, 422)["error"]
    assert "mood" in error["message"]


@pytest.mark.parametrize("key, value", [("images", [IMAGE]), ("role", "system"), ("tool_calls", [CALL])])
def test_score_leaves_no_key_of_a_query_or_document_out(post, key, value):
    content = {"content": "the cat", key: value}
    for body in ({"queries": content, "documents": "a"}, {"queries": "a", "documents": [content]}):
        error = post("/score", body, 400)["error"]
        assert error["code"] == "BAD_REQUEST" and f"[0].{key}" in error["message"]


# SGLang


def test_embeddings_answer_verl_with_the_reward(model, post, read):
    answer = post("/v1/embeddings", {"model": "tiny", "input": rendered(model, READ, 1)})
    reward = answer["data"][-1]["embedding"][-1]
    assert reward == pytest.approx(read[1], abs=1e-6)
    usage = answer.pop("usage")
    assert usage["prompt_tokens"] == usage["total_tokens"] > 0
    data = [{"object": "embedding", "embedding": [reward], "index": 0}]
    assert answer == {"object": "list", "data": data, "model": "tiny"}


def test_embeddings_take_texts_with_images(model, post, read, seen):
    text = rendered(model, SEEN, 0)
    both = [{"text": text, "image": IMAGE}, {"text": rendered(model, READ, 0)}]
    answer = post("/v1/embeddings", {"model": "tiny", "input": both})
    assert [entry["embedding"][0] for entry in answer["data"]] == pytest.approx([seen[0], read[0]], abs=1e-6)
    assert post("/v1/embeddings", {"input": [text]}, 422)["error"]["code"] == "IMAGE_COUNT"


def test_the_native_form_of_sglang_is_told_from_that_of_vllm(model, post, read, seen):
    one = post("/classify", {"text": rendered(model, SEEN, 1), "image_data": IMAGE})
    assert one == {"embedding": [pytest.approx(seen[1], abs=1e-6)], "meta_info": {}}
    texts = [rendered(model, SEEN, 0), rendered(model, READ, 0)]
    many = post("/classify", {"text": texts, "image_data": [[IMAGE], None]})
    assert [entry["embedding"][0] for entry in many] == pytest.approx([seen[0], read[0]], abs=1e-6)
    tokens = model.network.encoder.tokenizer(texts[1])["input_ids"]
    assert post("/classify", {"input_ids": tokens})["embedding"] == pytest.approx(read[:1], abs=1e-6)
    assert post("/classify", {"text": texts, "image_data": [IMAGE]}, 400)["error"]["code"] == "BAD_REQUEST"
    assert post("/classify", {"text": "a", "input_ids": [1]}, 400)["error"]["code"] == "BAD_REQUEST"


# slime


@pytest.mark.parametrize("kind", ["rendered", "messages"])
def test_slime_gets_a_bare_number(model, client, read, kind):
    prompts = {
        "messages": [{"role": "user", "content": READ["prompt"]}],
        "rendered": rendered(model, {**READ, "responses": [""]}, 0, ""),
    }  # fmt: skip
    body = {"prompt": prompts[kind], "response": "on a dog<|im_end|>", "label": {"gold": 1}}
    answer = client.post("/slime", json=body)
    assert answer.status_code == 200 and float(answer.text) == pytest.approx(read[0], abs=1e-6)


def test_slime_takes_images_from_messages_or_from_the_label(model, post, seen):
    messages = chat(SEEN, 0)[:1]
    assert post("/slime", {"prompt": messages, "response": "a red dog"}) == pytest.approx(seen[0], abs=1e-6)
    prompt = rendered(model, {**SEEN, "responses": [""]}, 0, "", num_pads=6)
    body = {"prompt": prompt, "response": "a red dog", "label": {"images": IMAGE}}
    assert post("/slime", body) == pytest.approx(seen[0], abs=1e-6)
    assert post("/slime", {**body, "label": "gold"}, 422)["error"]["code"] == "IMAGE_COUNT"
    assert post("/slime", {**body, "prompt": messages}, 422)["error"]["code"] == "IMAGE_COUNT"


@pytest.mark.parametrize(
    "prompt, response",
    [
        ("Why?", "Because."),
        ("[INST] Why? [/INST]", "Because.</s>"),
        ("<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>", "Because.<|eot_id|>"),
        ("user: Why?\nassistant: ", "Because."),
    ],
    ids=["plain", "mistral", "llama", "by hand"],
)
def test_slime_takes_no_text_that_this_template_did_not_render(post, prompt, response):
    error = post("/slime", {"prompt": prompt, "response": response}, 422)["error"]
    assert error["code"] == "RENDERED_TEXT" and "or send messages" in error["message"]


# All


@pytest.mark.parametrize(
    "path, body",
    [("/classify", {"input": "a"}), ("/pooling", {"input": "a"}), ("/score", {"queries": "a", "documents": "b"}),
     ("/v1/embeddings", {"input": "a"}), ("/classify", {"text": "a"})],
)  # fmt: skip
def test_a_model_that_is_not_served_is_named(post, path, body):
    assert post(path, {**body, "model": "other"}, 404)["error"]["code"] == "MODEL_UNKNOWN"


def test_a_group_that_the_model_cannot_read_is_refused_with_its_code(post):
    broken = {**SEEN, "images": ["data:image/png;base64,aaaa"]}
    assert post("/classify", {"messages": chat(broken, 0)}, 422)["error"]["code"].startswith("IMAGE_")


@pytest.mark.parametrize(
    "kind, key",
    [(openrlhf.GetReward, "query"), (r1_reward.GetRewardMllm, "query"), (vllm.TextInput, "input"),
     (sglang.NativeInput, "text"), (sglang.NativeInput, "input_ids"), (sglang.Embeddings, "input"),
     (vllm.ChatInput, "messages"), (slime.Sample, "prompt")],
)  # fmt: skip
def test_a_list_of_wrong_entries_is_left_at_the_first(kind, key):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({key: [1.5] * 1000})
    assert caught.value.error_count() < 12


@pytest.mark.parametrize(
    "path, body",
    [("/get_reward", {"query": ["a"] * 65}), ("/get_reward_mllm", {"query": ["a"] * 65}),
     ("/classify", {"input": ["a"] * 65}), ("/pooling", {"input": [[1]] * 65}), ("/classify", {"text": ["a"] * 65}),
     ("/v1/embeddings", {"input": ["a"] * 65})],
)  # fmt: skip
def test_too_many_conversations_are_refused_before_they_are_read(post, path, body):
    assert post(path, body, 413)["error"]["code"] == "REQUEST_TOO_LARGE"


@pytest.mark.parametrize("path", ["/health/", "/v1/models/"])
def test_a_path_with_a_slash_at_its_end_is_not_found(client, path):
    answer = client.get(path, follow_redirects=False)
    assert answer.status_code == 404 and answer.json()["error"]["message"] == f"GET {path}: Not Found"
