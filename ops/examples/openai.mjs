// Streams an answer with the openai client for Node:
//
//   npm install openai
//   BASE_URL=http://127.0.0.1:8080 node openai.mjs "Why is the sky blue?"

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.env.BASE_URL ?? "http://127.0.0.1:8080"}/v1`,
  apiKey: process.env.API_KEY ?? "none",
});
const { data: chunks, response } = await client.chat.completions
  .create(
    {
      model: "any",
      messages: [{ role: "user", content: process.argv[2] ?? "Why is the sky blue?" }],
      max_completion_tokens: 200,
      stream: true,
    },
    // The client sends a request again whose answer was lost. With a key it is worked on once.
    { headers: { "Idempotency-Key": crypto.randomUUID() } },
  )
  .withResponse();

for await (const chunk of chunks) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
process.stdout.write("\n");
console.error(`To be read again: /v1/streams/${response.headers.get("x-headrace-stream-id")}`);
