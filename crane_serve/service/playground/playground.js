// Examples fill a field; nothing is asked of the server.
document.addEventListener("click", (event) => {
  const example = event.target.closest("button[data-fills]");
  if (!example) return;
  const field = document.querySelector(`#${example.dataset.fills} textarea`);
  field.value = example.textContent;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  field.focus();
});

// The keys of the ARIA pattern for tabs, which Gradio leaves out.
document.addEventListener("keydown", (event) => {
  const tab = event.target.closest?.('[role="tab"]');
  if (!tab) return;
  const tabs = [...tab.closest('[role="tablist"]').querySelectorAll('[role="tab"]')];
  const at = tabs.indexOf(tab);
  const places = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: -1 };
  if (!(event.key in places)) return;
  const next = tabs.at(places[event.key] % tabs.length);
  event.preventDefault();
  next.click();
  next.focus();
});
