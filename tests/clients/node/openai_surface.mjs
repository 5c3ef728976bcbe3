// Prints as JSON what the openai client for Node makes of our answers.

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: "none", maxRetries: 0 });
const body = {
  model: "any",
  messages: [{ role: "user", content: "hello" }],
  temperature: 0,
  max_completion_tokens: 12,
};
const key = { headers: { "Idempotency-Key": "surface" } };
const streamed = { ...body, stream: true, stream_options: { include_usage: true } };

async function read(options) {
  const { data, response } = await client.chat.completions
    .create(streamed, options)
    .withResponse();
  let [text, usage] = ["", null];
  for await (const chunk of data) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage, replayed: response.headers.get("idempotent-replayed") };
}

async function refusalOf(call) {
  const error = await call.then(() => null, (thrown) => thrown);
  return { name: error.constructor.name, code: error.code, param: error.param };
}

const whole = (await client.chat.completions.create(body)).choices[0];
console.log(
  JSON.stringify({
    whole: { text: whole.message.content, finish_reason: whole.finish_reason },
    streamed: await read(key),
    again: await read(key),
    refused: await refusalOf(client.chat.completions.create({ ...body, n: 17 })),
    conflict: await refusalOf(client.chat.completions.create({ ...streamed, seed: 1 }, key)),
  }),
);
