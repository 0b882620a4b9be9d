"""Answers of a wanted form, as SDKs and frameworks ask for them, over the real claude.

The API calls whatever tool it is offered, with the value that everybody wants in the end."""

from __future__ import annotations

import datetime
import decimal
import json
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Callable, Literal, NamedTuple, Optional, Union

import pytest

import stub_api as stub
from libraries import library
from processes import run_to_end
from programs import client_folders, how_to_install
from project import clean_env
from rig import ANSWER_S, MODEL, Rig
from upstream import turns

openai = library("openai")
pydantic = pytest.importorskip("pydantic", reason="the pydantic package is not installed")

Json = Any
Body = Mapping[str, Json]

QUESTION = "How is the weather in Rome?"
ASKED: Json = [{"role": "user", "content": QUESTION}]
#: A program that has not ended by then never will.
RUN_TIMEOUT_S = 300
#: The tool that programs give the model beside the form.
TEMPERATURE = "temperature"


# ---------------------------------------------------------------------------
# An API that does as it is told
# ---------------------------------------------------------------------------

def obedient(body: Body, value: Json) -> stub.Reply:
    """First the temperature, if it can be had; then the value, by a tool if there is one."""
    tools = {tool["name"]: tool["input_schema"] for tool in body.get("tools", ())}
    called = [block["name"] for _, contents in turns(body) for block in contents
              if isinstance(block, dict) and block["type"] == "tool_use"]
    if tools.pop(TEMPERATURE, None) and TEMPERATURE not in called:
        return stub.tool_calls([(TEMPERATURE, {"city": "Rome"})])
    if tools:
        name, schema = next(iter(tools.items()))
        return stub.tool_calls([(name, in_keys_of(schema, value))])
    return stub.text(f"```json\n{json.dumps(value)}\n```")


def in_keys_of(schema: Json, value: Json) -> Json:
    """The value with the names that the schema has for its properties: the server may have
    changed those that the API refuses, in their places."""
    names = list(schema.get("properties", value))
    return {key if key in names else names[place]: each
            for place, (key, each) in enumerate(value.items())}


# ---------------------------------------------------------------------------
# The openai package
# ---------------------------------------------------------------------------

class Card(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    kind: Literal["card"]
    number: str


class Cash(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    kind: Literal["cash"]
    coins: list[int]


class Payment(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    by: Annotated[Union[Card, Cash], pydantic.Field(discriminator="kind")]


class Place(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    point: tuple[float, float]
    names: tuple[str, int, bool]


class Moment(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    day: datetime.date
    at: datetime.datetime
    id: uuid.UUID
    price: decimal.Decimal


class Account(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    number: str = pydantic.Field(alias="Account Number")
    street: str = pydantic.Field(alias="Stra\u00dfe")
    city: str


class Tree(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    leaf: Optional[int]
    branches: list[Tree]


class Bounds(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    level: int = pydantic.Field(ge=1, le=10, multiple_of=2)
    code: str = pydantic.Field(pattern="^[A-Z]{3}$", min_length=3, examples=["ABC"])
    tags: set[str] = pydantic.Field(max_length=3)


Tree.model_rebuild()
#: A model of pydantic, and what it is read from.
FORMS: dict[str, tuple[Any, Json]] = {
    "discriminated union": (Payment, {"by": {"kind": "cash", "coins": [1, 2]}}),
    "tuples": (Place, {"point": [41.9, 12.5], "names": ["Rome", 1, True]}),
    "dates": (Moment, {
        "day": "2026-11-30", "at": "2026-11-30T12:00:00Z", "price": "1.50",
        "id": "7c9e6679-7425-40de-944b-e07fc1f90ae7"}),
    "aliases": (Account, {"Account Number": "DE1", "Stra\u00dfe": "Am Markt", "city": "Bonn"}),
    "recursion": (Tree, {"leaf": None, "branches": [{"leaf": 1, "branches": []}]}),
    "bounds": (Bounds, {"level": 4, "code": "ABC", "tags": ["a"]}),
}


@pytest.fixture
def client(rig: Rig) -> Iterator[Any]:
    with openai.OpenAI(
        api_key="any", base_url=f"{rig.server.url}/v1", timeout=ANSWER_S, max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as found:
        yield found


def script(rig: Rig, value: Json) -> None:
    rig.stub.default = lambda body: obedient(body, value)


def from_chat(client: Any, form: Any) -> Any:
    found = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=form)
    return found.choices[0].message.parsed


def from_a_stream(client: Any, form: Any) -> Any:
    with client.chat.completions.stream(
        model=MODEL, messages=ASKED, response_format=form
    ) as stream:
        return stream.get_final_completion().choices[0].message.parsed


def from_responses(client: Any, form: Any) -> Any:
    return client.responses.parse(model=MODEL, input=QUESTION, text_format=form).output_parsed


def from_a_call(client: Any, form: Any) -> Any:
    tools = [openai.pydantic_function_tool(form)]
    found = client.chat.completions.parse(model=MODEL, messages=ASKED, tools=tools)
    return found.choices[0].message.tool_calls[0].function.parsed_arguments


@pytest.mark.exhaustive
@pytest.mark.parametrize("dialect", [from_chat, from_a_stream, from_responses, from_a_call])
def test_the_openai_package_parses_an_answer_into_an_object_of_the_class_it_was_given(
    rig: Rig, client: Any, dialect: Callable[[Any, Any], Any]
) -> None:
    parsed = {}
    for name, (form, value) in FORMS.items():
        script(rig, value)
        parsed[name] = dialect(client, form)
    assert parsed == {name: form.model_validate(value) for name, (form, value) in FORMS.items()}
    assert len(rig.bodies()) == len(FORMS)


# ---------------------------------------------------------------------------
# Frameworks
# ---------------------------------------------------------------------------

#: How all programs begin: what they want, and what they show of each way to get it.
BEGINNING = '''
import asyncio, json, sys
from datetime import date
from typing import Literal, Union
from pydantic import BaseModel, Field

URL, MODEL, QUESTION = sys.argv[1:]

class Sun(BaseModel):
    kind: Literal["sun"]
    hours: int

class Rain(BaseModel):
    kind: Literal["rain"]
    millimetres: float

class Report(BaseModel):
    """A report on the weather."""
    city: str
    day: date
    place: tuple[float, float]
    sky: Union[Sun, Rain] = Field(discriminator="kind")

def temperature(city: str) -> str:
    """Tell how warm it is."""
    return "20 degrees in " + city

def show(name, get):
    try:
        shown = json.loads(get().model_dump_json())
    except Exception as error:
        shown = f"{type(error).__name__}: {error}"
    print(json.dumps([name, shown]), flush=True)
'''
REPORT: Json = {
    "city": "Rome", "day": "2026-11-30", "place": [41.9, 12.5],
    "sky": {"kind": "rain", "millimetres": 2.5}}


class Program(NamedTuple):
    """What follows the beginning, and the names of what it shows."""
    library: str
    names: str
    code: str


PROGRAMS = (
    Program("langgraph", "json_schema function_calling json_mode agent old_agent", '''
import warnings
warnings.simplefilter("ignore")
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent

model = ChatOpenAI(model=MODEL, base_url=URL + "/v1", api_key="any", max_retries=0)

for method in ("json_schema", "function_calling", "json_mode"):
    show(method, lambda: model.with_structured_output(Report, method=method).invoke(QUESTION))

def ask(agent):
    return agent.invoke({"messages": [("user", QUESTION)]})["structured_response"]

show("agent", lambda: ask(create_agent(model, [temperature], response_format=Report)))
show("old_agent", lambda: ask(create_react_agent(model, [temperature], response_format=Report)))
'''),
    Program("pydantic_ai", "tool native prompted responses", '''
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=URL + "/v1", api_key="any")
chat = OpenAIChatModel(MODEL, provider=provider)
responses = OpenAIResponsesModel(MODEL, provider=provider)

def ask(model, output):
    agent = Agent(model, output_type=output, tools=[temperature], retries=0)
    return agent.run_sync(QUESTION).output

show("tool", lambda: ask(chat, ToolOutput(Report)))
show("native", lambda: ask(chat, NativeOutput(Report)))
show("prompted", lambda: ask(chat, PromptedOutput(Report)))
show("responses", lambda: ask(responses, NativeOutput(Report)))
'''),
    Program("agents", "chat responses", '''
from agents import (
    Agent, AgentOutputSchema, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner,
    function_tool, set_tracing_disabled)
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=URL + "/v1", api_key="any", max_retries=0)
chat = OpenAIChatCompletionsModel(MODEL, client)
responses = OpenAIResponsesModel(MODEL, client)
output = AgentOutputSchema(Report, strict_json_schema=False)

def ask(model, output):
    agent = Agent("Weather", model=model, tools=[function_tool(temperature)], output_type=output)
    return Runner.run_sync(agent, QUESTION).final_output

show("chat", lambda: ask(chat, output))
show("responses", lambda: ask(responses, output))
'''),
    Program("instructor", (
        "TOOLS TOOLS_STRICT JSON JSON_O1 MD_JSON JSON_SCHEMA RESPONSES_TOOLS FUNCTIONS"), '''
import instructor, openai

client = openai.OpenAI(base_url=URL + "/v1", api_key="any", max_retries=0)

def ask(mode):
    return instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create(
        model=MODEL, response_model=Report, max_retries=0,
        messages=[{"role": "user", "content": QUESTION}])

for mode in ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_O1", "MD_JSON", "JSON_SCHEMA",
             "RESPONSES_TOOLS", "FUNCTIONS"):
    show(mode, lambda: ask(mode))
'''),
    Program("dspy", "predict", '''
import dspy

class Weather(dspy.Signature):
    """Report on the weather."""
    question: str = dspy.InputField()
    city: str = dspy.OutputField()
    day: date = dspy.OutputField()
    place: tuple[float, float] = dspy.OutputField()
    sky: Union[Sun, Rain] = dspy.OutputField()

dspy.configure(
    lm=dspy.LM("openai/" + MODEL, api_base=URL + "/v1", api_key="any", cache=False, num_retries=0),
    adapter=dspy.JSONAdapter())

def ask(module):
    found = module(question=QUESTION)
    return Report(city=found.city, day=found.day, place=found.place, sky=found.sky)

show("predict", lambda: ask(dspy.Predict(Weather)))
'''),
)

#: The same in JavaScript, with the schema library that its frameworks share.
JAVASCRIPT = '''
import { createRequire } from "node:module";
const [folder, url, model, question] = process.argv.slice(2);
const load = createRequire(folder + "/");
const { generateObject, generateText, streamObject, Output, stepCountIs, tool } = load("ai");
const { createOpenAI } = load("@ai-sdk/openai");
const { createOpenAICompatible } = load("@ai-sdk/openai-compatible");
const { createAnthropic } = load("@ai-sdk/anthropic");
const { z } = load("zod");

const options = { baseURL: url + "/v1", apiKey: "any" };
const models = {
  compatible: createOpenAICompatible(
    { ...options, name: "ocp", supportsStructuredOutputs: true })(model),
  chat: createOpenAI(options).chat(model),
  responses: createOpenAI(options).responses(model),
  messages: createAnthropic(options)(model),
};
const schema = z.object({
  city: z.string(),
  day: z.iso.date(),
  place: z.tuple([z.number(), z.number()]),
  sky: z.discriminatedUnion("kind", [
    z.object({ kind: z.literal("sun"), hours: z.int() }),
    z.object({ kind: z.literal("rain"), millimetres: z.number() }),
  ]),
});
const tools = { temperature: tool({
  description: "Tells how warm it is.", inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => "20 degrees in " + city }) };

async function streamed(asked) {
  const stream = streamObject(asked);
  for await (const part of stream.partialObjectStream) void part;
  return stream.object;
}

async function show(name, get) {
  const shown = await get().catch((error) => String(error));
  console.log(JSON.stringify([name, shown]));
}

for (const [name, each] of Object.entries(models)) {
  const asked = { model: each, prompt: question, maxRetries: 0 };
  await show(name, async () => (await generateObject({ ...asked, schema })).object);
  await show(name + " stream", () => streamed({ ...asked, schema }));
  await show(name + " tool", async () => (await generateText({
    ...asked, tools, stopWhen: stepCountIs(3), output: Output.object({ schema }) })).output);
}
'''
JAVASCRIPT_NAMES = [f"{dialect}{way}" for dialect in ("compatible", "chat", "responses", "messages")
                    for way in ("", " stream", " tool")]


def python_with(library: str) -> str:
    """A Python of the clients that has a library; skips the test if there is none."""
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({library!r}) is None)"
    for folder in client_folders():
        python = folder / "bin/python"
        if python.exists() and not subprocess.run([python, "-c", look]).returncode:
            return str(python)
    pytest.skip(how_to_install(library))


@pytest.mark.exhaustive
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.library)
def test_a_framework_gets_the_form_that_it_wants_in_every_way(
    rig: Rig, tmp_path: Path, program: Program
) -> None:
    script(rig, REPORT)
    shown = shown_by(
        tmp_path, [python_with(program.library)], BEGINNING + program.code, rig.server.url)
    assert shown == dict.fromkeys(program.names.split(), REPORT)


@pytest.mark.exhaustive
def test_the_vercel_sdk_gets_the_form_that_it_wants_in_every_way(
    rig: Rig, tmp_path: Path
) -> None:
    script(rig, REPORT)
    folder = next((each for each in client_folders() if (each / "node_modules/ai").exists()), None)
    if folder is None:
        pytest.skip(how_to_install("ai"))
    shown = shown_by(tmp_path, ["node"], JAVASCRIPT, str(folder), rig.server.url)
    assert shown == dict.fromkeys(JAVASCRIPT_NAMES, REPORT)


def shown_by(home: Path, command: list[str], code: str, *arguments: str) -> dict[str, Json]:
    """What a program shows, by name."""
    file = home / "ask.mjs"
    file.write_text(code)
    ran = run_to_end(
        [*command, str(file), *arguments, MODEL, QUESTION], cwd=home, timeout_s=RUN_TIMEOUT_S,
        env=clean_env(HOME=str(home), OPENAI_API_KEY="any", LITELLM_LOCAL_MODEL_COST_MAP="True"))
    assert ran.code == 0, ran
    return dict(json.loads(line) for line in ran.stdout.splitlines())
