// Sphinx highlights search words inside other words as well, such as "TRE" in "centre". Keep those that begin a word;
// words of up to three letters must be whole ones.
function dropHighlightsInsideWords() {
  for (const mark of document.querySelectorAll("span.highlighted")) {
    const inside = /[\p{L}\p{N}]$/u.test(mark.previousSibling?.textContent ?? "");
    const goesOn = /^[\p{L}\p{N}]/u.test(mark.nextSibling?.textContent ?? "");
    if (inside || (goesOn && mark.textContent.length <= 3)) mark.replaceWith(...mark.childNodes);
  }
}
document.addEventListener("DOMContentLoaded", () => {
  dropHighlightsInsideWords();
  new MutationObserver(dropHighlightsInsideWords).observe(document.body, { childList: true, subtree: true });
});
