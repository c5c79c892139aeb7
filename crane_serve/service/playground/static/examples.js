// Prompts to begin with, and texts whose loss can be looked at. All of them are our own.

const EXAMPLES = [
  {
    language: "en",
    name: "English",
    prompts: ["The capital of France is", "In the morning the old fisherman went down to the"],
    texts: ["The old bridge across the river was closed last winter, and people now walk through the park to the market."],
  },
  {
    language: "zh",
    name: "中文",
    prompts: ["长城是中国古代", "春天来了，公园里的花"],
    texts: ["河上的旧桥去年冬天关闭了，人们现在穿过公园走到市场去。"],
  },
  {
    language: "vi",
    name: "Tiếng Việt",
    prompts: ["Thủ đô của Việt Nam là", "Mỗi buổi sáng, bà tôi ra chợ mua"],
    texts: ["Cây cầu cũ bắc qua sông đã đóng cửa từ mùa đông năm ngoái, nên bây giờ mọi người đi bộ qua công viên ra chợ."],
  },
];

export function putExamples(element) {
  for (const group of document.querySelectorAll("[data-examples]")) {
    const field = document.getElementById(group.dataset.fills);
    for (const { language, name, ...texts } of EXAMPLES) {
      for (const text of texts[group.dataset.examples]) {
        const attributes = { type: "button", class: "example", lang: language, title: name, "data-fills": field.id };
        const button = element("button", attributes, text);
        button.addEventListener("click", () => {
          field.value = text;
          field.focus();
        });
        group.append(button);
      }
    }
  }
}
