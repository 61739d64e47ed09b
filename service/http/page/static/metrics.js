// The subset of the Prometheus text format that this service writes.

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/**
 * Read the samples of an answer to GET /metrics.
 * @returns {Map<string, {labels: Record<string, string>, value: number}[]>}
 */
export function parseMetrics(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    const sample = { labels: Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, text]) => [key, text])) };
    sample.value = value === "+Inf" ? Infinity : Number(value);
    if (!metrics.has(name)) metrics.set(name, []);
    metrics.get(name).push(sample);
  }
  return metrics;
}

/** Return the sum of a metric over its labels; 0 if it has no samples. */
export function total(metrics, name) {
  return (metrics.get(name) ?? []).reduce((sum, { value }) => sum + value, 0);
}

/**
 * Return a histogram without labels.
 * @returns {{upTo: number, count: number}[]} observations per bucket, not cumulative
 */
export function histogram(metrics, name) {
  let below = 0;
  return (metrics.get(`${name}_bucket`) ?? []).map(({ labels, value }) => {
    const count = value - below;
    below = value;
    return { upTo: labels.le === "+Inf" ? Infinity : Number(labels.le), count };
  });
}

/** Return the upper bound of the bucket that contains a quantile (0..1) of the observations; null if there are none. */
export function quantileBound(buckets, part) {
  const all = buckets.reduce((sum, { count }) => sum + count, 0);
  let seen = 0;
  for (const { upTo, count } of buckets) {
    seen += count;
    if (all && seen >= part * all) return upTo;
  }
  return null;
}
