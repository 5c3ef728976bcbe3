// Prints as JSON what our client reads where not every gateway answers.

const { streamChat } = await import(process.env.CLIENT);

const answer = await streamChat({
  baseUrl: process.env.URLS.split(" "),
  body: { messages: [{ role: "user", content: "hello" }], max_tokens: 30 },
});
console.log(JSON.stringify(answer));
