// What each mask changed in one task and metric, as a table: masks by languages.

import { cell, element, figure, table } from "./elements.js";

const SIGNIFICANT = 0.05; // q-values below are marked

function choices(evaluation) {
  return evaluation.tasks.flatMap((task) => task.metrics.map((metric) => ({ task, metric })));
}

export function taskNames(evaluation) {
  return choices(evaluation).map(({ task, metric }) => `${task.name}: ${metric.title}`);
}

function mark({ q_value, beyond_band }) {
  if (q_value === null || q_value >= SIGNIFICANT) return "";
  return beyond_band ? " ●" : " ○";
}

export function heatMap(evaluation, choice) {
  const { task, metric } = choices(evaluation)[choice];
  const cells = new Map(
    evaluation.cells
      .filter((one) => one.task === task.name && one.metric === metric.name && one.change !== null)
      .map((one) => [`${one.mask}\n${one.language}`, one]),
  );
  const largest = Math.max(0, ...[...cells.values()].map(({ change }) => Math.abs(change.mean)).filter(Number.isFinite));
  const digits = largest >= 1 ? 2 : 3;
  const shown = (mask, language) => {
    const strong = evaluation.masks[mask].language === language;
    const one = cells.get(`${mask}\n${language}`);
    if (!one) return cell("-", { strong });
    const { mean, low, high } = one.change;
    const ends = [low, high].map((end) => (end === null ? null : figure(end, digits, true)));
    return cell(figure(mean, digits, true) + mark(one), {
      detail: ends.includes(null) ? "" : `[${ends.join(", ")}]`,
      strong,
      change: metric.higher_is_better ? -mean : mean,
      full: largest || 1,
    });
  };
  const masks = task.masks.filter((mask) => mask !== "none");
  const methods = [...new Set(masks.map((mask) => evaluation.masks[mask].method))];
  const ordered = methods.flatMap((method) => masks.filter((mask) => evaluation.masks[mask].method === method));
  const rows = ordered.map((mask) => [cell(mask), ...task.languages.map((language) => shown(mask, language))]);
  const direction = metric.higher_is_better ? "below 0 is worse" : "above 0 is worse";
  const items = Object.values(task.items).reduce((sum, number) => sum + number, 0).toLocaleString("en");
  const about =
    `${evaluation.name}: ${evaluation.model.name ?? "the model"}, ${Object.keys(evaluation.masks).length - 1} masks, ` +
    `${items} items. Masked minus unmasked, with 95 % intervals; orange is worse, blue better, bold the language that ` +
    "the mask was made for. ● q < 0.05 and outside what random masks do, ○ q < 0.05.";
  return [
    element("h2", {}, `${task.name}: ${metric.title}`),
    element("p", {}, about),
    table(`Change in ${metric.unit}: ${direction}`, ["mask", ...task.languages], rows),
  ];
}
