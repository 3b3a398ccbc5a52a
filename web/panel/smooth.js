/** Running means of noisy curves. */

/**
 * Exponential running mean over steps that need not follow each other; unbiased from the first value on.
 * @param {number[]} steps rising
 * @param {(number|null)[]} values
 * @param {number} span steps after which a value counts for a third
 * @returns {(number|null)[]}
 */
export function smoothed(steps, values, span) {
  let sum = 0, weight = 0, before = steps[0] - 1;
  return values.map((value, i) => {
    if (value == null) return null;
    const kept = Math.exp(-(steps[i] - before) / span);
    before = steps[i];
    sum = kept * sum + (1 - kept) * value;
    weight = kept * weight + (1 - kept);
    return sum / weight;
  });
}

/** A span that shows the trend of a run of that many steps. */
export function spanOf(steps) {
  return Math.max(5, (steps || 0) / 80);
}
