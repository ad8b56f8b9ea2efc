// How a conversation or a text can begin.

const EXAMPLES = {
  chat: [
    "Mia came to the garden with a red kite. The kite is red. Mia is in the garden. What colour is the kite?",
    "Tell me a story.",
    "Count to seven.",
    "What can you do?",
  ],
  text: ["Once upon a time", "Rosa came to the park with a black boat.", "ROMEO:", "The little girl went to the park and saw"],
};

export const examples = (kind) => EXAMPLES[kind];
