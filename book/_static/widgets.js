// The widget library asks for `MathJax.Hub`, of MathJax 2, whenever it draws a text; these pages have MathJax 3. No widget
// of this book holds an equation, so nothing is to be drawn. MathJax replaces its global object while it loads; hence
// the setter.
let mathJax = window.MathJax;
const withHub = (object) => (object ? Object.assign(object, { Hub: { Queue() {} } }) : object);
withHub(mathJax);
Object.defineProperty(window, "MathJax", {
  configurable: true,
  enumerable: true,
  get: () => mathJax,
  set: (object) => { mathJax = withHub(object); },
});

// Names for what the widget library leaves nameless, so that screen readers can say what a slider or a picture is.
function nameWidgets() {
  for (const handle of document.querySelectorAll(".noUi-handle:not([aria-label])")) {
    const label = handle.closest(".widget-slider, .jupyter-widgets")?.querySelector(".widget-label");
    handle.setAttribute("aria-label", label?.textContent.trim() || "slider");
  }
  for (const image of document.querySelectorAll("img.widget-image:not([alt])")) {
    image.alt = "The picture that the sliders choose";
  }
}

// A click on a figure shows it as large as the window; another click, or Escape, closes it.
function enlarge(image) {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", image.alt || "figure");
  dialog.append(image.cloneNode());
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => { if (event.key === "Escape") dialog.close(); }); // Sphinx takes it first
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// What is folded is printed, too, and folded again afterwards.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("article details:not([open])")];
  for (const details of opened) details.open = true;
});
window.addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});

document.addEventListener("DOMContentLoaded", () => {
  nameWidgets();
  for (const image of document.querySelectorAll(".bd-article figure img")) {
    image.addEventListener("click", (event) => {
      event.preventDefault(); // Sphinx may have put a link to the file around it, which a keyboard can follow
      enlarge(image);
    });
  }
  new MutationObserver(nameWidgets).observe(document.body, { childList: true, subtree: true });
});
