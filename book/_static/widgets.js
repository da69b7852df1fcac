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
