// Tokens and speed of an answer as a line of text.

const number = new Intl.NumberFormat("en");

/** `usage` is the server's; the times are this page's clock in milliseconds, `first` null where nothing came. */
export function figures(usage, began, first, ended) {
  const completion = usage.completion_tokens ?? 0;
  const thinking = usage.completion_tokens_details?.reasoning_tokens ?? 0;
  const { cached_tokens: cached = 0, image_tokens: image = 0 } = usage.prompt_tokens_details ?? {};
  const of = [image && `${number.format(image)} image`, cached && `${number.format(cached)} cached`].filter(Boolean);
  const parts = [
    `${number.format(usage.prompt_tokens ?? 0)} prompt${of.length ? ` (${of.join(", ")})` : ""}`,
    thinking && `${number.format(thinking)} thinking`,
    `${number.format(completion - thinking)} answer tokens`,
  ];
  if (first !== null) {
    const took = (ended - first) / 1000;
    // The first token is there when the time begins.
    if (completion > 1 && took > 0.02) parts.push(`${number.format(Math.round((completion - 1) / took))} tokens/s`);
    parts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
  }
  return parts.filter(Boolean).join(" · ");
}
