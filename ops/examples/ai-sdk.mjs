// Streams an answer with Vercel's AI SDK:
//
//   npm install ai @ai-sdk/openai-compatible
//   BASE_URL=http://127.0.0.1:8080 node ai-sdk.mjs "Why is the sky blue?"

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const headrace = createOpenAICompatible({
  name: "headrace",
  baseURL: `${process.env.BASE_URL ?? "http://127.0.0.1:8080"}/v1`,
  apiKey: process.env.API_KEY,
  includeUsage: true,
});
const answer = streamText({
  model: headrace("any"),
  prompt: process.argv[2] ?? "Why is the sky blue?",
  maxOutputTokens: 200,
  headers: { "Idempotency-Key": crypto.randomUUID() },
  onError({ error }) {
    throw error;
  },
});

for await (const piece of answer.textStream) process.stdout.write(piece);
process.stdout.write("\n");
const { inputTokens, outputTokens } = await answer.usage;
console.error(`${inputTokens} tokens read, ${outputTokens} written, ${await answer.finishReason}`);
