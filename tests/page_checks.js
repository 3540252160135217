// What a reader could not see, reach or hear of a page, by kind; its text inside `within`. Contrast as WCAG 2.2 computes it.
function pageFaults(within = "body") {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;

  function rgba(color) {  // of any CSS colour, in [0, 1]
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return Array.from(canvas.getImageData(0, 0, 1, 1).data, (value) => value / 255);
  }
  const over = (front, back) => front.slice(0, 3).map((v, k) => v * front[3] + back[k] * (1 - front[3]));

  function background(element) {
    const layers = [];
    for (let node = element; node; node = node.parentElement) layers.push(rgba(getComputedStyle(node).backgroundColor));
    const paper = matchMedia("(prefers-color-scheme: dark)").matches ? [0.07, 0.07, 0.07] : [1, 1, 1];
    return layers.reverse().reduce((back, front) => over(front, back), paper);
  }
  function opacity(element) {
    let product = 1;
    for (let node = element; node; node = node.parentElement) product *= Number(getComputedStyle(node).opacity);
    return product;
  }
  function luminance(color) {
    const [r, g, b] = color.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function contrast(element, color) {
    const back = background(element);
    const front = rgba(color);
    front[3] *= opacity(element);
    const pair = [luminance(over(front, back)), luminance(back)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  }
  const seen = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && element.getClientRects().length > 0;
  const root = document.querySelector(within);
  const name = (element) => `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""}`;
  const short = (text) => text.trim().replace(/\s+/g, " ").slice(0, 40);

  const faults = { overflow: [], contrast: [], drawn: [], small: [], tables: [], unreachable: [], unnamed: [] };
  const wide = document.scrollingElement.scrollWidth;
  if (wide > innerWidth) {
    faults.overflow.push(`the page is ${wide} of ${innerWidth}`);
    for (const element of document.body.querySelectorAll("*")) {
      const right = element.getBoundingClientRect().right;
      if (right > innerWidth + 1) faults.overflow.push(`${name(element)} ends at ${Math.round(right)}`);
    }
  }

  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  let read = 0;
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !seen(element) || ["TITLE", "STYLE", "SCRIPT"].includes(element.tagName.toUpperCase())) continue;
    read += 1;
    const style = getComputedStyle(element);
    const ratio = contrast(element, element.namespaceURI.endsWith("svg") ? style.fill : style.color);
    if (ratio < 4.5) faults.contrast.push(`${ratio.toFixed(2)} ${name(element)}: ${short(node.data)}`);
    const size = parseFloat(style.fontSize) * (element.getScreenCTM?.().a ?? 1);  // as a chart is drawn
    if (size < 9) faults.small.push(`${size.toFixed(1)} px ${name(element)}: ${short(node.data)}`);
  }
  for (const element of root.querySelectorAll("*")) {
    for (const which of ["::before", "::after"]) {
      const style = getComputedStyle(element, which);
      if (!/^"\s*\S/.test(style.content) || !seen(element)) continue;
      const ratio = contrast(element, style.color);
      if (ratio < 4.5) faults.contrast.push(`${ratio.toFixed(2)} ${name(element)}${which}: ${style.content}`);
    }
  }
  for (const element of document.querySelectorAll("svg .curve, svg .dot")) {
    const style = getComputedStyle(element);
    const ratio = contrast(element, element.classList.contains("dot") ? style.fill : style.stroke);
    if (seen(element) && ratio < 3) faults.drawn.push(`${ratio.toFixed(2)} ${name(element)}`);
  }

  for (const table of document.querySelectorAll("table")) {
    const what = short(table.innerText);
    const isOfFacts = !table.querySelector("thead");
    const heads = [...table.querySelectorAll("thead th")];
    if (!isOfFacts && heads.some((cell) => cell.scope !== "col")) faults.tables.push(`a column without scope: ${what}`);
    for (const row of table.querySelectorAll("tr")) {
      if (row.closest("thead")) continue;
      if (!row.closest("tbody") || row.cells[0].scope !== "row") faults.tables.push(`a row without scope: ${what}`);
    }
    if (isOfFacts && table.rows[0].cells.length > 2) faults.tables.push(`no thead: ${what}`);
  }

  for (const element of document.body.querySelectorAll("*")) {  // what scrolls must be reached by keys, and have a name
    if (element.scrollWidth <= element.clientWidth + 1 || !["auto", "scroll"].includes(getComputedStyle(element).overflowX)) continue;
    if (element.tabIndex < 0 || !element.hasAttribute("tabindex")) faults.unreachable.push(name(element));
    if (!element.getAttribute("aria-label")) faults.unnamed.push(name(element));
  }
  for (const element of document.querySelectorAll("svg[role=img], img, input")) {
    const label = element.getAttribute("aria-label") || element.getAttribute("alt") || element.closest("label")?.innerText;
    if (!label?.trim()) faults.unnamed.push(name(element));
  }
  return { ...faults, read: [read] };
}
