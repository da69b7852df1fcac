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
document.addEventListener("DOMContentLoaded", () => {
  nameWidgets();
  new MutationObserver(nameWidgets).observe(document.body, { childList: true, subtree: true });
});
