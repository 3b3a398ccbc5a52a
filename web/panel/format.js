/** Numbers and times as the panel shows them. */

/** "0.1234", "1.0e-4", "–" where there is none. */
export function number(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace("e+", "e");
  return value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

/** "1:02:03" or "4:05" for seconds, "–" where there is none. */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (part) => String(part).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** "3.2 it/s", or "4.0 s/it" where a step takes longer than a second. */
export function speed(rate) {
  if (!rate || !Number.isFinite(rate)) return "–";
  const [value, unit] = rate >= 1 ? [rate, "it/s"] : [1 / rate, "s/it"];
  return `${value >= 100 ? Math.round(value) : value.toPrecision(2)} ${unit}`;
}
