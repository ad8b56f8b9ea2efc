// How a conversation or a text can begin.

const EXAMPLES = {
  chat: [
    "Lily is in the park with a red kite. The kite of Lily is red. What colour is the kite?",
    "Tell me a story.",
    "Which number comes after two?",
    "What can you do?",
  ],
  text: ["Once upon a time", "Tom is in the kitchen. Tom found a red", "ROMEO:", "The little girl went to the park and saw"],
};

export const examples = (kind) => EXAMPLES[kind];
