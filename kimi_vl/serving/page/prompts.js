// The ready messages that ask for places, as the server's package has them.

const PLACE = "\ufffc"; // where what the user writes goes

/** By name, {system, user}; empty until they have been fetched. */
export const prompts = {};

export async function fetchPrompts() {
  const response = await fetch(new URL("page/prompts.json", document.baseURI)).catch(() => null);
  if (response?.ok) Object.assign(prompts, await response.json());
}

/** What is sent for a `text` that is asked in a `form`, "" for as it is written: {system, user}. */
export function inForm(form, text) {
  const { system = "", user = PLACE } = prompts[form] ?? {};
  return { system, user: user.replace(PLACE, () => text) };
}
