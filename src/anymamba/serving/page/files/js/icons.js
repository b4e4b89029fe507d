// Symbols as lines in a square of 24, so that they look the same with any fonts.

const NAMESPACE = "http://www.w3.org/2000/svg";
const LINES = {
  menu: "M4 7h16M4 12h16M4 17h16",
  help: "M9 9a3 3 0 1 1 4 2.8c-.7.3-1 .8-1 1.7M12 17.2v.1",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
  close: "M7 7l10 10M17 7L7 17",
  again: "M19 12a7 7 0 1 1-2-5l2 2M19 5v4h-4",
  copy: "M9 9h10v10H9zM5 15V5h10",
  edit: "M5 19l1-4L16 5l3 3L9 18z",
  earlier: "M14 7l-5 5 5 5",
  later: "M10 7l5 5-5 5",
  compare: "M5 5h14v14H5zM12 5v14",
};

/** A symbol by its name. */
export function icon(name) {
  const svg = document.createElementNS(NAMESPACE, "svg");
  const path = document.createElementNS(NAMESPACE, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", LINES[name]);
  svg.append(path);
  return svg;
}
